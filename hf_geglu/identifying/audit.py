"""Does a model do what its config says? Each entry that names an activation is changed, and the blocks are looked at
again."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from hf_geglu.identifying.identify import identify
from hf_geglu.identifying.identity import Identity
from hf_geglu.sites import FoundSites, Site, find_sites

Verdict = Literal["followed", "ignored", "coerced", "contradicted", "elsewhere", "refused"]
"""followed: the blocks do what it says. ignored: nothing in the model changes with it, although there are blocks.
coerced: blocks change, but to something else. contradicted: blocks follow, but do not do what it says now.
elsewhere: it governs other modules. refused: the model cannot be built, or not be understood, with another value."""

_GATED = "gated-"
_TRIED = ("gelu", "silu", "relu")
_DERIVED = ("dense_act", "is_gated")
"""What T5 and its relatives derive from `feed_forward_proj`, and write into their files beside it."""
_SWITCHES = ("swiglu", "gated", "glu_", "_glu", "use_glu")


@dataclass(frozen=True, slots=True)
class Finding:
    """One entry of a config."""

    entry: str
    stated: str
    verdict: Verdict
    computed: tuple[str, ...]
    """Activations of the blocks that it governs; where it governs none, of all blocks."""
    tried: str
    """The value that it was changed to."""
    then: tuple[str, ...]
    """What the blocks computed under that value."""
    blocks: int
    """How many blocks changed with it."""
    setting: str = ""
    """The switch that was on, such as "use_swiglu_ffn=True"."""

    @property
    def lies(self) -> bool:
        """Whether somebody who believes the config would be wrong."""
        return self.verdict in ("ignored", "coerced", "contradicted")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        where = f" (with {self.setting})" if self.setting else ""
        now, then = ", ".join(self.computed) or "no block", ", ".join(self.then) or "no block"
        what = {
            "followed": f"followed by {self.blocks} blocks",
            "ignored": f"IGNORED: the blocks compute {now}, and still do with {self.tried!r}",
            "coerced": f"COERCED: with {self.tried!r} the blocks compute {then}",
            "contradicted": f"CONTRADICTED: the blocks compute {now}",
            "elsewhere": "governs other modules than FFN blocks",
            "refused": f"could not be looked at with {self.tried!r}",
        }[self.verdict]
        return f"{self.entry} = {self.stated!r}{where}: {what}"


def entries(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of everything in a config that names an activation, nested configs included."""
    for key, value in _declared(config):
        if isinstance(value, PretrainedConfig):
            yield from entries(value, f"{prefix}{key}.")
        elif isinstance(value, str) and ("act" in key or "feed_forward_proj" in key):
            if value.removeprefix(_GATED) not in dict.keys(ACT2FN):
                continue
            yield prefix + key, value


def switches(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of entries that say whether blocks are gated, and do not say so now."""
    for key, value in _declared(config):
        if isinstance(value, PretrainedConfig):
            yield from switches(value, f"{prefix}{key}.")
        elif value is False and any(part in key for part in _SWITCHES):
            yield prefix + key


def _declared(config: Any) -> Iterator[tuple[str, Any]]:
    """What a config was made from, without what its class derives from that (T5's `dense_act_fn`)."""
    kind = type(config)
    declared = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    declared |= set(inspect.signature(kind.__init__).parameters)
    for key, value in sorted(vars(config).items()):
        if not key.startswith("_") and (key in declared or isinstance(value, PretrainedConfig)):
            yield key, value


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config with other entries, and everything derived from them derived again."""
    data = config.to_dict()
    for key in changes:
        at, node = config, data
        *parents, _ = key.split(".")
        for parent in parents:
            at, node = getattr(at, parent), node[parent]
        known = {name for name, _ in _declared(at)}
        for name in [name for name in node if name.startswith(_DERIVED) and name not in known]:
            del node[name]
        node[key.rpartition(".")[2]] = changes[key]
    return type(config).from_dict(data)


def audit(
    config: Any, build: Callable[[Any], nn.Module], *, seen: tuple[nn.Module, FoundSites] | None = None
) -> tuple[Finding, ...]:
    """Every entry that names an activation, and whether the blocks do as it says.

    Args:
        config: of the model; it is not changed.
        build: makes the model of a config; without weights is enough. What it raises for the config as it is, is
            raised.
        seen: the model of the config as it is and its sites, where they are known already.
    """
    found = _audited(config, build, "", seen)
    for switch in switches(config):
        try:
            switched = _changed(config, {switch: True})
            found += [one for one in _audited(switched, build, f"{switch}=True", None) if one.lies]
        except Exception:  # a class may refuse any combination; then there is nothing to be misled by
            continue
    return tuple(found)


def _audited(
    config: Any, build: Callable[[Any], nn.Module], setting: str, seen: tuple[nn.Module, FoundSites] | None
) -> list[Finding]:
    stated = dict(entries(config))
    if not stated:
        return []
    if seen is None:
        model = build(_changed(config, {}))
        seen = model, find_sites(model)
    before, sites = seen[0], {site.up: site for site in seen[1]}
    found = [_look(config, build, before, sites, entry, value, setting) for entry, value in stated.items()]
    governed = {_level(one.entry) for one in found if one.blocks}
    # another entry of the same config governs its blocks: then this one is for a head, a convolution, a pooler
    return [
        replace(one, verdict="elsewhere")
        if one.verdict == "ignored" and _level(one.entry) in governed and not one.stated.startswith(_GATED)
        else one
        for one in found
    ]


def _look(
    config: Any,
    build: Callable[[Any], nn.Module],
    before: nn.Module,
    sites: Mapping[str, Site],
    entry: str,
    value: str,
    setting: str,
) -> Finding:
    """One entry, changed to each of a few other values until one is not followed."""
    finding: Finding | None = None
    for tried in sorted(_others(value), key=lambda one: canonical(one) in _activations(sites)):
        try:
            after = build(_changed(config, {entry: tried}))
        except Exception:  # any class may refuse any config in its own way
            finding = finding or Finding(entry, value, "refused", _activations(sites), tried, (), 0, setting)
            continue
        others = {site.up: site for site in find_sites(after)}
        changed = [up for up in sites if up not in others or _unit(others[up]) != _unit(sites[up])]
        now = {up: sites[up] for up in changed}
        then = {up: others[up] for up in changed if up in others}
        verdict: Verdict
        if changed and not then:  # under this value nobody can tell what they are
            finding = finding or Finding(entry, value, "refused", _activations(now), tried, (), 0, setting)
            continue
        if not changed:
            counts = sites and _functions(before) == _functions(after) and _is_built(after, config, entry, tried)
            verdict = "ignored" if counts else "elsewhere"
            now, then = dict(sites), others
        elif _activations(now) != (canonical(value),) or _is_gated(value, now):
            verdict = "contradicted"
        elif _activations(then) != (canonical(tried),) or _is_gated(tried, then):
            verdict = "coerced"
        else:
            verdict = "followed"
        if finding is not None and finding.verdict == "ignored" and verdict == "followed":
            return replace(finding, verdict="coerced", blocks=len(changed))
        seen = Finding(entry, value, verdict, _activations(now), tried, _activations(then), len(changed), setting)
        if verdict in ("coerced", "contradicted"):
            return replace(seen, blocks=max(len(changed), finding.blocks if finding else 0))
        if verdict == "followed":
            return seen
        finding = seen if finding is None or finding.verdict == "refused" else finding
    assert finding is not None
    return finding


def _level(entry: str) -> str:
    return entry.rpartition(".")[0]


def _is_built(model: nn.Module, config: Any, entry: str, value: str) -> bool:
    """Whether the model has modules of the nested config that the entry is in."""
    *parents, key = entry.split(".")
    nested = config
    for parent in parents:
        nested = getattr(nested, parent)
    held = (getattr(module, "config", None) for module in model.modules())
    return not parents or any(type(one) is type(nested) and getattr(one, key, None) == value for one in held)


def _is_gated(value: str, sites: Mapping[str, Site]) -> bool:
    """Whether the value asks for gated blocks and these are not."""
    return value.startswith(_GATED) and not all(site.gated for site in sites.values())


@cache
def canonical(name: str) -> str:
    """The name that stands for a function of ACT2FN, by what it computes: "gelu_new" is "gelu_pytorch_tanh"."""
    plain = name.removeprefix(_GATED)
    seen = identify(ACT2FN[plain].eval())
    return seen.activation or plain if isinstance(seen, Identity) else plain


def _others(value: str) -> list[str]:
    prefix = _GATED if value.startswith(_GATED) else ""
    return [prefix + name for name in _TRIED if name != canonical(value)]


def _unit(site: Site) -> tuple[str, str]:
    return site.layout, site.activation


def _activations(sites: Mapping[str, Site]) -> tuple[str, ...]:
    return tuple(sorted({site.activation for site in sites.values()}))


def _functions(model: nn.Module) -> dict[str, tuple[type, tuple[tuple[str, str], ...]]]:
    """Of every module its class, and the functions and kernels that its attributes hold."""
    kinds = (types.FunctionType, types.BuiltinFunctionType)
    return {
        path: (type(module), tuple((n, repr(v)) for n, v in vars(module).items() if isinstance(v, kinds)))
        for path, module in model.named_modules()
    }
