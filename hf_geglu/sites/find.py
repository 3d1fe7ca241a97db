"""The search: candidates from the deepest module up, one probe for each kind of block, and a reason for each
refusal."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn
from transformers import PreTrainedModel

from hf_geglu.sites.lone import lone_projection
from hf_geglu.sites.observe import Probe, Seen, observe, visible
from hf_geglu.sites.overheard import overhear
from hf_geglu.sites.projections import Port, leads_on, read_port, within
from hf_geglu.sites.signature import Signatures
from hf_geglu.sites.site import FoundSites, Kind, Rejection, Site, innermost
from hf_geglu.sites.stacks import Stacks, stacks_of
from hf_geglu.sites.twin import Mold
from hf_geglu.sites.verdict import Observation

PATIENCE = 2
"""A projection that a run did not explain is left to one block further up; above that come whole encoders."""

MOST = 3
"""An FFN block has at most so many projections; one with more that cannot be run is not tried again from outside."""


@dataclass(slots=True, eq=False)
class Free:
    """A projection that no block has been found for yet."""

    path: str
    port: Port
    doubts: int = 0
    """How many blocks around it have been left behind since one of them was run, or could not be, to no avail."""
    probed: set[int] = field(default_factory=set)
    """Blocks that ran and showed no link from this projection to another one inside."""


def search(model: nn.Module) -> FoundSites:
    """Every FFN block of a model, and every place that might have been one."""
    return _Search(model).run()


class _Search:
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._mold = Mold(model)
        self._signatures = Signatures()
        self._probes: dict[Hashable, Probe] = {}
        self._visited: set[int] = set()
        self._sites: list[Site] = []
        self._ups: set[str] = set()
        """The up projections of the sites: lists of experts make thousands of them."""
        self._rejected: dict[str, Rejection] = {}
        self._open: list[tuple[Rejection, frozenset[str]]] = []
        self._stacks: list[Stacks] = []
        self._unrun: list[tuple[str, tuple[str, ...]]] = []
        """Blocks that no synthetic arguments fit, with the projections that are open in them."""

    def run(self) -> FoundSites:
        left = [] if read_port(self._model) is not None else self._visit(self._model, "")
        self._run_as_the_model_does()
        self._look_at_lone_projections(left)
        for stacks in self._stacks:
            reason = f"stacked matrices ({stacks}): {(stacks.errors or ['no block around them is ever called'])[0]}"
            self._rejected[stacks.path] = Rejection(path=stacks.path, class_name=stacks.class_name, reason=reason)
        taken = {path for site in self._sites for path in (site.gate, site.up, site.down)}
        for rejection, paths in self._open:
            if not paths & taken:
                self._rejected.setdefault(rejection.path, rejection)
        order = {path: index for index, (path, _) in enumerate(self._model.named_modules())}
        last = len(order)
        return FoundSites(
            tuple(sorted(self._sites, key=lambda site: order.get(site.up, last))),
            tuple(sorted(self._rejected.values(), key=lambda rejection: order.get(rejection.path, last))),
        )

    def _visit(self, module: nn.Module, path: str) -> list[Free]:
        """Look through the children, then at the module itself; returns the projections nobody has claimed."""
        self._visited.add(id(module))
        free: list[Free] = []
        for name, child in module._modules.items():
            if child is None or id(child) in self._visited:
                continue
            child_path = f"{path}.{name}" if path else name
            port = read_port(child)
            if port is None:
                free.extend(self._visit(child, child_path))
            else:
                self._visited.add(id(child))
                free.append(Free(child_path, port))
        stacks = stacks_of(module, path)
        if stacks is not None:
            self._stacks.append(stacks)
        called = type(module).forward is not nn.Module.forward
        if not called:
            return free
        if self._stacks and not isinstance(module, PreTrainedModel):
            self._probe_stacks(module, path)
        if not _unseen_pairs(free):
            return _still_open(free)
        if isinstance(module, PreTrainedModel):
            self._look_at_heads(module, path, free)
            return free
        return self._probe(module, path, free)

    def _probe(self, module: nn.Module, path: str, free: list[Free]) -> list[Free]:
        """Run one block and sort what it shows into sites and rejections; what stays unexplained stays free."""
        prefix = f"{path}." if path else ""
        open_paths = tuple(one.path.removeprefix(prefix) for one in free)
        signature = (self._signatures.of(module), open_paths)
        probe = self._probes.get(signature)
        if probe is None:
            stub_sets = list(self._stub_sets(module, open_paths))
            probe = observe(module, stub_sets=stub_sets, mold=self._mold) if stub_sets else Probe((), (), None)
            self._probes[signature] = probe
        self._take(module, path, probe.seen)
        reasons = list(dict.fromkeys(refusal.reason for refusal in probe.refused))
        if reasons:
            self._rejected[path] = Rejection(path=path, class_name=type(module).__name__, reason="; ".join(reasons))
        if probe.seen or reasons:
            return []
        reason = self._why_open(probe, free)
        if reason is not None:
            rejection = Rejection(path=path, class_name=type(module).__name__, reason=reason)
            self._open.append((rejection, frozenset(one.path for one in free)))
            if probe.error is not None:
                self._unrun.append((path, open_paths))
        if probe.error is not None and len(free) > MOST:
            return []
        for one in free:
            one.doubts = max(one.doubts, 1)
            if probe.error is None:
                one.probed.add(id(module))
        return _still_open(free)

    def _take(self, module: nn.Module, path: str, shown: Iterable[Seen]) -> None:
        """The sites that a probe showed, but for those of a block that ran inside this one."""
        for site in (as_site(module, path, seen) for seen in shown):
            if site.up not in self._ups:
                self._ups.add(site.up)
                self._sites.append(site)

    def _run_as_the_model_does(self) -> None:
        """Another look at the blocks that could not be run, with the arguments that the model gives them."""
        places = [*self._unrun, *((stacks.path, ()) for stacks in self._stacks)]
        firsts: dict[Hashable, str] = {}
        for path, _ in places:
            firsts.setdefault(self._signatures.of(self._model.get_submodule(path)), path)
        heard = overhear(self._model, list(firsts.values()), self._mold)
        for path, open_paths in places:
            module = self._model.get_submodule(path)
            signature = self._signatures.of(module)
            given = heard.get(firsts[signature])
            if given is None:
                continue
            probe = self._probes.get((signature, open_paths, "given"))
            if probe is None:
                stub_sets = list(self._stub_sets(module, open_paths))
                if len(within(module)) <= 4 * MOST or not stub_sets:
                    stub_sets.append(())  # with arguments that fit, a block may run as it is; a whole stage is too much
                probe = observe(module, stub_sets=stub_sets, mold=self._mold, given=given)
                self._probes[(signature, open_paths, "given")] = probe
            self._take(module, path, probe.seen)
            if probe.refused and not probe.seen and len(open_paths) <= MOST:
                reason = "; ".join(dict.fromkeys(refusal.reason for refusal in probe.refused))
                self._rejected.setdefault(path, Rejection(path=path, class_name=type(module).__name__, reason=reason))
        taken = {site.block for site in self._sites}
        self._stacks = [
            stacks for stacks in self._stacks if stacks.path not in taken and stacks.path not in self._rejected
        ]

    def _why_open(self, probe: Probe, free: list[Free]) -> str | None:
        """The reason that stands unless a block further up explains these projections; the innermost one counts."""
        if all(one.doubts for one in free):
            return None
        if probe.error is not None and not _attention_shaped(free):
            return f"could not be run alone on synthetic input: {probe.error}"
        if (
            probe.error is None
            and len(free) <= MOST
            and any(_there_and_back(a.port, b.port) for a in free for b in free)
        ):
            return "ran, but nothing that one of its projections says reaches another"
        return None

    def _stub_sets(self, module: nn.Module, open_paths: Collection[str]) -> Iterator[tuple[str, ...]]:
        """Which children to replace by noise: first all that hold several projections, then all but one at a time.

        What is understood already (it holds none of `open_paths`) always stays replaced.
        """
        several = list(self._several(module, "", open_paths))
        everything = tuple(path for path, _ in several)
        sets = [everything]
        for spared, understood in several:
            if not understood:
                inside = self._several(module.get_submodule(spared), spared, open_paths)
                sets.append(
                    tuple(path for path in everything if path != spared)
                    + tuple(path for path, known in inside if known)
                )
        for stubs in sets:
            ports = [port for _, port in visible(module, stubs)]
            if any(a is not b and leads_on(a, b) for a in ports for b in ports):
                yield stubs

    def _several(self, module: nn.Module, path: str, open_paths: Collection[str]) -> Iterator[tuple[str, bool]]:
        """The topmost descendants with two projections or more, and whether each is understood already."""
        for name, child in module._modules.items():
            if child is None or read_port(child) is not None:
                continue
            child_path = f"{path}.{name}" if path else name
            if type(child).forward is nn.Module.forward:
                yield from self._several(child, child_path, open_paths)
            elif len(within(child)) > 1:
                yield child_path, not any(one.startswith(f"{child_path}.") for one in open_paths)

    def _probe_stacks(self, module: nn.Module, path: str) -> None:
        """Run a module for the stacks below it: their own one, or else the next ones up, which choose the experts."""
        for stacks in list(self._stacks):
            if path and stacks.path != path and not stacks.path.startswith(f"{path}."):
                continue
            if len(stacks.errors) > PATIENCE:
                continue
            signature = (self._signatures.of(module), stacks.path.removeprefix(path))
            probe = self._probes.get(signature)
            if probe is None:
                probe = observe(module, mold=self._mold, widths=stacks.widths, tokens=stacks.experts)
                self._probes[signature] = probe
            own = self._below(stacks, path)
            seen = [one for one in probe.seen if set(one.observation.projections) & own]
            reasons = [refusal.reason for refusal in probe.refused if set(refusal.projections) & own]
            self._take(module, path, seen)
            stacks.errors.append("; ".join(reasons) or probe.error or "ran, but none of its matrices feeds another")
            if seen or reasons:
                self._stacks.remove(stacks)
            if reasons:
                reason = f"stacked matrices ({stacks}): {stacks.errors[-1]}"
                self._rejected[stacks.path] = Rejection(path=stacks.path, class_name=stacks.class_name, reason=reason)

    def _below(self, stacks: Stacks, path: str) -> set[str]:
        """Paths of the parameters as a probe of the module at `path` names them."""
        prefix = f"{path}." if path else ""
        return {f"{stacks.path}.{name}".removeprefix(prefix) for name in stacks.shapes}

    def _look_at_heads(self, model: nn.Module, path: str, free: list[Free]) -> None:
        """Projections that sit in a whole model itself: a model is no block and is never run."""
        prefix = f"{path}." if path else ""
        own = [one for one in free if "." not in one.path.removeprefix(prefix) and not one.port.convolves]
        for first, second in pairwise(own):
            if leads_on(first.port, second.port):
                widths = f"{first.port.d_in} -> {first.port.d_out}, {second.port.d_in} -> {second.port.d_out}"
                reason = f"{first.path} and {second.path} ({widths}) sit in the model itself, in no block: a head"
                self._rejected[path] = Rejection(path=path, class_name=type(model).__name__, reason=reason)

    def _look_at_lone_projections(self, left: list[Free]) -> None:
        for one in left:
            path = one.path.rpartition(".")[0]
            module = self._model.get_submodule(path)
            if isinstance(module, PreTrainedModel) or path in self._rejected or len(within(module)) != 1:
                continue
            reason = lone_projection(module, mold=self._mold)
            if reason is not None:
                self._rejected[path] = Rejection(path=path, class_name=type(module).__name__, reason=reason)


def as_site(block: nn.Module, path: str, seen: Seen) -> Site:
    """What was seen in a block at `path`, in the words of the whole model."""
    one = seen.observation

    def absolute(relative: str) -> str:
        return f"{path}.{relative}" if path else relative

    form = one.up.port.form
    holder = innermost(one.projections) if one.up.port.stacked else ""
    return Site(
        block=absolute(holder) if holder else path,
        gate=absolute(one.gate.path),
        up=absolute(one.up.path),
        down=absolute(one.down.path),
        kind=_kind(block, one),
        layout=one.fit.layout,
        activation=one.fit.activation,
        activation_path=None if seen.activation_path is None else absolute(seen.activation_path),
        activation_call=seen.activation_call,
        gate_half=one.fit.gate_half,
        projection="linear" if form == "convolution" else form,
        groups=one.up.port.groups,
        dim=seen.dim,
        value_offset=one.fit.offset,
        limit=one.fit.limit,
        d_in=one.up.port.d_in,
        width=one.down.port.d_in,
        d_out=one.down.port.d_out,
    )


def _kind(block: nn.Module, one: Observation) -> Kind:
    if one.up.port.stacked:
        return "experts"
    if one.up.port.convolves:
        return "conv"
    if len({path.rpartition(".")[0] for path in one.projections}) > 1:
        return "split"
    return "module" if len(within(block)) == len(one.projections) else "inline"


def _still_open(free: list[Free]) -> list[Free]:
    """What the next block up may still explain: once in doubt, a projection gets that one more chance."""
    kept = [one for one in free if one.doubts < PATIENCE]
    for one in kept:
        one.doubts += one.doubts > 0
    return kept


def _unseen_pairs(free: list[Free]) -> bool:
    """Whether one projection could feed another, and no block that ran has shown otherwise."""
    return any(
        a is not b and leads_on(a.port, b.port) and not (a.probed & b.probed) and not _only_convolves(a.port, b.port)
        for a in free
        for b in free
    )


def _only_convolves(first: Port, second: Port) -> bool:
    """Convolutions wider than 1 that do not lead back to the width they started from are no block of any kind."""
    return "convolution" in (first.form, second.form) and first.d_in != second.d_out


def _there_and_back(first: Port, second: Port) -> bool:
    """Whether two projections lead to another width and back, as only those of a block do."""
    return leads_on(first, second) and first.d_in == second.d_out != first.d_out


def _attention_shaped(free: list[Free]) -> bool:
    """Four projections of which three read the same width and one returns to it: queries, keys, values and output.

    A block with two or three might be an FFN, and is reported when it cannot be run; this one cannot be.
    """
    *inputs, output = [one.port for one in free]
    return len(inputs) == 3 and {port.d_in for port in inputs} == {output.d_out} and output.d_in == inputs[0].d_out
