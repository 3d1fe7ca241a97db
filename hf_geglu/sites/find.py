"""The search: candidates from the deepest module up, one probe for each kind of block, and a reason for each
refusal."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from transformers import PreTrainedModel

from hf_geglu.inputs import Inputs
from hf_geglu.sites.free import MOST, PATIENCE, Free, Unrun, still_open, unseen_pairs, why_open
from hf_geglu.sites.hypotheses import Fit
from hf_geglu.sites.locating import Seen
from hf_geglu.sites.lone import lone_projection
from hf_geglu.sites.observe import Probe, observe, visible
from hf_geglu.sites.overheard import Arguments, overhear
from hf_geglu.sites.placing import as_site
from hf_geglu.sites.projections import leads_on, read_port, within
from hf_geglu.sites.signature import Signatures
from hf_geglu.sites.site import FoundSites, Rejection, Site
from hf_geglu.sites.stacks import Stacks, stacks_of
from hf_geglu.sites.twin import Mold


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a site's formula rests on."""

    fit: Fit
    runner_up: Fit | None
    direct: bool
    """Whether the unit's answer itself enters the down projection."""


def search(model: nn.Module, inputs: Inputs | None = None) -> FoundSites:
    """Every FFN block of a model, and every place that might have been one."""
    return _Search(model, inputs).run()


def explore(model: nn.Module) -> tuple[FoundSites, Mapping[str, Evidence]]:
    """The same, with the evidence for each site, by the path of its up projection."""
    searching = _Search(model, None)
    return searching.run(), searching.evidence


class _Search:
    def __init__(self, model: nn.Module, inputs: Inputs | None) -> None:
        self._model = model
        self._inputs = inputs
        self._mold = Mold(model)
        self._signatures = Signatures()
        self._probes: dict[Hashable, Probe] = {}
        self._visited: set[int] = set()
        self._sites: list[Site] = []
        self.evidence: dict[str, Evidence] = {}
        """By the up projections of the sites: lists of experts make thousands of them."""
        self._rejected: dict[str, Rejection] = {}
        self._open: list[tuple[str, str, frozenset[str]]] = []
        """Places that stay open unless one of their projections is claimed after all: path, reason, projections."""
        self._stacks: list[Stacks] = []
        self._unrun: list[Unrun] = []

    def run(self) -> FoundSites:
        left = [] if read_port(self._model) is not None else self._visit(self._model, "")
        self._run_as_the_model_does()
        self._leave_open()
        self._look_at_lone_projections(left)
        for stacks in self._stacks:
            why = (stacks.errors or ["no block around them is ever called"])[0]
            self._reject(stacks.path, f"stacked matrices ({stacks}): {why}")
        self._reject_what_is_open()
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
        if not unseen_pairs(free):
            return still_open(free)
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
            self._reject(path, "; ".join(reasons))
        if probe.seen or reasons:
            self._look_again_at_the_rest(path, probe, free)
            return []
        self._doubt(path, probe.error, free)
        if probe.error is not None and len(free) > MOST:
            return []
        for one in free:
            one.doubts = max(one.doubts, 1)
            if probe.error is None:
                one.probed.add(id(module))
        return still_open(free)

    def _take(self, module: nn.Module, path: str, shown: Iterable[Seen]) -> None:
        """The sites that a probe showed, but for those of a block that ran inside this one."""
        for seen in shown:
            site, one = as_site(module, path, seen), seen.observation
            if site.up not in self.evidence:
                self.evidence[site.up] = Evidence(one.fit, one.runner_up, one.direct)
                self._sites.append(site)

    def _doubt(self, path: str, error: str | None, free: list[Free]) -> None:
        """A block that showed nothing: what is to be said of it unless that changes."""
        reason, shadowed = why_open(error, free), all(one.doubts for one in free)
        if error is not None:
            self._unrun.append(Unrun(path, tuple(free), reason, shadowed))
        elif reason is not None and not shadowed:
            self._open.append((path, reason, frozenset(one.path for one in free)))

    def _look_again_at_the_rest(self, path: str, probe: Probe, free: list[Free]) -> None:
        """What a block still holds beside the sites that it showed, in what it did not get to: another stream's."""
        prefix = f"{path}." if path else ""
        rest = [one for one in free if one.path.removeprefix(prefix) in probe.idle]
        if unseen_pairs(rest):
            error = probe.error or "some of its projections were not called"
            self._unrun.append(Unrun(path, tuple(rest), why_open(error, rest), shadowed=False))

    def _run_as_the_model_does(self) -> None:
        """Another look at the blocks that could not be run, with the arguments that the model gives them. What then
        runs is understood; what does not stays open."""
        places = [*((one.path, one.open_below()) for one in self._unrun), *((one.path, ()) for one in self._stacks)]
        firsts: dict[Hashable, str] = {}
        for path, _ in places:
            firsts.setdefault(self._signatures.of(self._model.get_submodule(path)), path)
        heard = overhear(self._model, list(firsts.values()), self._mold, self._inputs)
        understood: set[int] = set()
        for index, (path, open_below) in enumerate(places):
            module = self._model.get_submodule(path)
            given = heard.get(firsts[self._signatures.of(module)])
            unrun = self._unrun[index] if index < len(self._unrun) else None
            if given is None or (unrun is not None and unrun.shadowed and not unseen_pairs(unrun.free)):
                continue
            probe = self._probe_as_given(module, open_below, given)
            self._take(module, path, probe.seen)
            shadowed = unrun is not None and unrun.shadowed
            if probe.refused and not probe.seen and not shadowed and path not in self._rejected:
                self._reject(path, "; ".join(dict.fromkeys(refusal.reason for refusal in probe.refused)))
            if probe.error is None and unrun is not None:
                understood.add(index)
                for one in unrun.free:
                    one.probed.add(id(module))
        self._unrun = [one for index, one in enumerate(self._unrun) if index not in understood]
        taken = {site.block for site in self._sites}
        self._stacks = [
            stacks for stacks in self._stacks if stacks.path not in taken and stacks.path not in self._rejected
        ]

    def _probe_as_given(self, module: nn.Module, open_below: tuple[str, ...], given: Arguments) -> Probe:
        signature = (self._signatures.of(module), open_below, "given")
        probe = self._probes.get(signature)
        if probe is None:
            stub_sets = list(self._stub_sets(module, open_below))
            if len(within(module)) <= 4 * MOST or not stub_sets:
                stub_sets.append(())  # with arguments that fit, a block may run as it is; a whole stage is too much
            probe = observe(module, stub_sets=list(dict.fromkeys(stub_sets)), mold=self._mold, given=given)
            self._probes[signature] = probe
        return probe

    def _leave_open(self) -> None:
        """What could not be run by any means is undecided: of blocks around the same projections, the innermost."""
        standing: set[str] = set()
        for one in self._unrun:
            if one.shadowed and (one.paths & standing or not unseen_pairs(one.free)):
                continue
            if one.reason is not None:
                standing |= one.paths
                self._open.append((one.path, one.reason, one.paths))

    def _reject_what_is_open(self) -> None:
        taken = {path for site in self._sites for path in (site.gate, site.up, site.down)}
        for path, reason, paths in self._open:
            if path not in self._rejected and not paths & taken:
                self._reject(path, reason)

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
                self._reject(stacks.path, f"stacked matrices ({stacks}): {stacks.errors[-1]}")

    def _below(self, stacks: Stacks, path: str) -> set[str]:
        """Paths of the parameters as a probe of the module at `path` names them."""
        prefix = f"{path}." if path else ""
        held = f"{stacks.path}." if stacks.path else ""
        return {f"{held}{name}".removeprefix(prefix) for name in stacks.shapes}

    def _look_at_heads(self, model: nn.Module, path: str, free: list[Free]) -> None:
        """Projections that sit in a whole model itself: a model is no block and is never run."""
        prefix = f"{path}." if path else ""
        own = [one for one in free if "." not in one.path.removeprefix(prefix) and not one.port.convolves]
        for first, second in pairwise(own):
            if leads_on(first.port, second.port):
                widths = f"{first.port.d_in} -> {first.port.d_out}, {second.port.d_in} -> {second.port.d_out}"
                reason = f"{first.path} and {second.path} ({widths}) sit in the model itself, in no block: a head"
                self._reject(path, reason)

    def _look_at_lone_projections(self, left: list[Free]) -> None:
        for one in left:
            path = one.path.rpartition(".")[0]
            module = self._model.get_submodule(path)
            if isinstance(module, PreTrainedModel) or path in self._rejected or len(within(module)) != 1:
                continue
            reason = lone_projection(module, mold=self._mold)
            if reason is not None:
                self._reject(path, reason)

    def _reject(self, path: str, reason: str) -> None:
        """A place that is not taken. Of several reasons the last one stands."""
        name = type(self._model.get_submodule(path)).__name__
        self._rejected[path] = Rejection(path=path, class_name=name, reason=reason)
