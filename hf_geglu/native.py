"""Does a plain config of this class load the variant? Found out by behaviour.

Configs lie: gpt_oss and lfm2 ignore their `hidden_act`, ``GemmaConfig(hidden_act="gelu")`` is coerced to the tanh
form. So a
twin of the model is built from the changed config on the meta device (no weights), and the finder says what its blocks
compute. Only if that is exactly what the plan wants, at every site, is the variant native.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from hf_geglu.modeling_geglu import config_entry
from hf_geglu.sites import FoundSites, find_sites
from hf_geglu.skeleton import skeleton

_ALIASES = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_pytorch_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
    "silu": ("silu", "swish"),
}
_GATED_PREFIX = "gated-"
"""T5's way to name a gated block in `feed_forward_proj`: "gated-silu". The one key whose value is not an activation."""


def activation_keys(config: Any, activation: str, prefix: str = "") -> Iterator[str]:
    """Dotted names of the config entries, nested configs included, that name `activation` or an alias of it."""
    from transformers import PretrainedConfig

    names = _ALIASES.get(activation, (activation,))
    for key, value in sorted(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            yield from activation_keys(value, activation, f"{prefix}{key}.")
        elif not isinstance(value, str) or value.removeprefix(_GATED_PREFIX) not in names:
            continue
        elif "act" in key or value.startswith(_GATED_PREFIX):
            yield prefix + key


def native_config_change(model: nn.Module, found: FoundSites, wanted: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The config entries that make the plain class build what the plan wants, and the reason for the answer.

    Args:
        model: the model as it is.
        found: its sites.
        wanted: for each site that the plan covers (by its `up`), the activation its gate shall have.

    Returns:
        Dotted config entries with their new values, empty where no config does it; and a sentence that says why.
    """
    config: Any = model.config
    expected = {site.up: wanted.get(site.up, site.activation) for site in found.sites}
    changing = {site.activation: expected[site.up] for site in found.sites if site.activation != expected[site.up]}
    changes: dict[str, str] = {}
    for source, target in changing.items():
        for key in activation_keys(config, source):
            gated = str(config_entry(config, key)).startswith(_GATED_PREFIX)
            changes[key] = _GATED_PREFIX + target if gated else target
    if not changes:
        return {}, f"no entry of {type(config).__name__} names the activation {', '.join(changing)}"
    towers = {key.rpartition(".")[0] for key in changes}
    attempts = [changes] + [{k: v for k, v in changes.items() if k.rpartition(".")[0] == tower} for tower in towers]
    problem = ""
    for attempt in attempts if len(towers) > 1 else [changes]:
        problem = _observed_difference(model, attempt, expected, found)
        if not problem:
            return attempt, f"{type(model).__name__} takes it from its config"
    return {}, problem


def _observed_difference(
    model: nn.Module, changes: Mapping[str, str], expected: Mapping[str, str], found: FoundSites
) -> str:
    """Empty where a model built from the changed config has exactly the `expected` activations and is the same model
    otherwise, else what differs."""
    shown = ", ".join(f"{key}={value!r}" for key, value in changes.items())
    config: Any = model.config
    try:
        twin = skeleton(changed_config(config, changes), type(model))
    except Exception as error:  # any class may refuse any config in its own way; then it is not native, and this is why
        return f"{type(model).__name__} cannot be built with {shown}: {error}"
    observed = {site.up: site.activation for site in find_sites(twin)}
    for path, activation in expected.items():
        if observed.get(path) != activation:
            return f"with {shown} {type(model).__name__} computes {observed.get(path)!r} at {path}, not {activation!r}"
    # the same entry may govern what is no site: routed experts, a head, a convolution
    activations = {site.activation_path for site in found.sites}
    others = dict(twin.named_modules())
    for path, module in model.named_modules():
        if path not in activations and _settings(module, path, activations) != _settings(
            others[path], path, activations
        ):
            return f"{shown} would change {path} too, which the plan leaves as it is"
    return ""


def _settings(module: nn.Module, path: str, apart: Collection[str | None]) -> tuple[type, dict[str, Any]]:
    """What a module does apart from its numbers: its class, and the functions and names that its attributes hold."""
    kinds = (str, types.FunctionType, types.BuiltinFunctionType)
    held = {name: value for name, value in vars(module).items() if isinstance(value, kinds)}
    return type(module), {name: value for name, value in held.items() if f"{path}.{name}" not in apart}


def changed_config(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of `config` with dotted entries replaced, as it would come back from disk."""
    data = config.to_dict()
    for key, value in changes.items():
        *parents, name = key.split(".")
        node = data
        for parent in parents:
            node = node[parent]
        node[name] = value
    return type(config).from_dict(data)
