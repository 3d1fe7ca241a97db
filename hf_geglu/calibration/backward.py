"""Gradients at every site, layer by layer from the last to the first: what `gather` does in one go where the weights
are in memory.

A layer is run again on what it was given, with its weights in memory, and its gradient is taken at once. What a batch
keeps between two layers are the gradients of what earlier layers returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch

from hf_geglu.calibration.gather import Statistic, drawing, mask_of, score
from hf_geglu.calibration.seen import Seen, watching
from hf_geglu.calibration.shelf import Shelf
from hf_geglu.sites import Site
from hf_geglu.streaming import Nested, Player, Unit
from hf_geglu.streaming.nested import tensors_in, with_tensors

Begin = Callable[[Unit], Mapping[str, Statistic]]
"""Makes the statistics of a layer's sites, by their `up`; the layer's weights are in memory."""
End = Callable[[Unit, Mapping[str, Statistic]], None]
"""Takes them when all batches have passed; the layer's weights are still in memory."""
Tell = Callable[[], None]
"""Called when a batch has passed a layer."""

Leaves = dict[int, list[torch.Tensor]]
"""The tensors that were handed out for a call, by its number."""


class Backward:
    """One sweep.

    Args:
        player: that has played all batches.
        sites: to watch, by the path of the layer they lie in.
        seed: of the labels, as in `gather`.
        shelf: keeps where the sweep is.
        name: of this sweep there.
    """

    def __init__(self, player: Player, sites: Mapping[str, list[Site]], *, seed: int, shelf: Shelf, name: str) -> None:
        self._player, self._sites, self._seed, self._shelf, self._name = player, sites, seed, shelf, name
        batches = range(len(player.batches))
        self._calls = {batch: player.tape.units(batch) for batch in batches}
        self._first = {
            batch: next((n for n, unit in enumerate(calls) if unit in sites), len(calls))
            for batch, calls in self._calls.items()
        }
        self._left = {batch: len(calls) for batch, calls in self._calls.items()}
        self._gradients: dict[int, dict[tuple[int, int], torch.Tensor]] = {}
        self._open: dict[str, Mapping[str, Statistic]] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def run(self, begin: Begin, end: End, tell: Tell) -> None:
        """From the outputs to the first site."""
        if not self._take_up():
            self._begin_at_outputs()
            self._keep()
        while unit := self._next():
            with self._player.holding(unit):
                self._pass(unit, begin, tell)
                if unit.path in self._open and not self._comes_again(unit):
                    end(unit, self._open.pop(unit.path))
            self._keep()

    def _next(self) -> Unit | None:
        """The layer of the batch that has most before it."""
        waiting = [batch for batch, left in self._left.items() if left > self._first[batch]]
        if not waiting:
            return None
        batch = max(waiting, key=lambda batch: (self._left[batch], -batch))
        return self._player.units[self._calls[batch][self._left[batch] - 1]]

    def _comes_again(self, unit: Unit) -> bool:
        return any(unit.path in calls[self._first[b] : self._left[b]] for b, calls in self._calls.items())

    def _begin_at_outputs(self) -> None:
        """What follows the last layer is run once more, batch by batch, and its gradient taken."""
        with ExitStack() as held:
            there: set[str] = set()
            for batch, inputs in enumerate(self._player.batches):
                leaves: Leaves = {}
                with torch.enable_grad():
                    outputs = self._player.outputs(batch, self._hand_out(batch, leaves), held, there)
                    total = score(outputs, inputs.get("attention_mask"), drawing(self._seed, batch))
                    if total.requires_grad:
                        total.backward()  # type: ignore[no-untyped-call]
                self._gradients[batch] = {}
                self._collect(batch, leaves)

    def _pass(self, unit: Unit, begin: Begin, tell: Tell) -> None:
        sites = self._sites.get(unit.path, [])
        if sites and unit.path not in self._open:
            self._open[unit.path] = self._begun(unit, begin)
        statistics = self._open.get(unit.path, {})

        def on_seen(seen: Seen) -> None:
            with torch.no_grad():
                statistics[seen.site.up].update(seen)

        with watching(self._player.residency.model, sites, on_seen, gradients=True) as told:
            for batch, inputs in enumerate(self._player.batches):
                told(mask_of(inputs))
                calls = self._calls[batch]
                while self._left[batch] > self._first[batch] and calls[self._left[batch] - 1] == unit.path:
                    self._left[batch] -= 1
                    self._back(batch, self._left[batch], unit)
                tell()

    def _back(self, batch: int, call: int, unit: Unit) -> None:
        """From the gradients of what a call returned to those of what earlier calls did."""
        waiting = self._gradients[batch]
        given = {place: waiting.pop((number, place)) for number, place in sorted(waiting) if number == call}
        if not given:
            return
        leaves: Leaves = {}
        with torch.enable_grad():
            args, kwargs = self._player.arguments(batch, call, self._hand_out(batch, leaves))
            cuts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

            def cut(tensor: torch.Tensor) -> torch.Tensor:
                if not tensor.requires_grad:
                    return tensor
                if id(tensor) not in cuts:
                    cuts[id(tensor)] = tensor, tensor.detach().requires_grad_()
                return cuts[id(tensor)][1].clone()  # a layer may write into what it is given

            given_now = with_tensors(args, cut), with_tensors(kwargs, cut)
            returned = list(tensors_in(self._player.call(unit, given_now)))
            reached = [place for place in given if returned[place].requires_grad]
            torch.autograd.backward([returned[place] for place in reached], [given[place] for place in reached])
            through = [(whole, part.grad) for whole, part in cuts.values() if part.grad is not None]
            if through:
                torch.autograd.backward([whole for whole, _ in through], [gradient for _, gradient in through])
        self._collect(batch, leaves)

    def _hand_out(self, batch: int, leaves: Leaves) -> Callable[[int, Nested], Nested]:
        """Calls from the first layer with a site on get gradients."""

        def hand_out(number: int, returned: Nested) -> Nested:
            if number >= self._first[batch]:
                leaves[number] = list(tensors_in(returned))
                for tensor in leaves[number]:
                    tensor.requires_grad_(tensor.is_floating_point())
            return returned

        return hand_out

    def _collect(self, batch: int, leaves: Leaves) -> None:
        gradients = self._gradients[batch]
        for number, tensors in leaves.items():
            for place, tensor in enumerate(tensors):
                if tensor.grad is not None:
                    before = gradients.get((number, place))
                    gradients[number, place] = tensor.grad if before is None else before + tensor.grad

    def _begun(self, unit: Unit, begin: Begin) -> Mapping[str, Statistic]:
        """New statistics, or those that were under way when the sweep was killed."""
        statistics = begin(unit)
        for up, statistic in statistics.items():
            prefix = f"statistic|{unit.path}|{up}|"
            kept = {name.removeprefix(prefix): t for name, t in self._kept.items() if name.startswith(prefix)}
            if kept:
                statistic.load(kept)
        return statistics

    def _keep(self) -> None:
        """Write down where the sweep is."""
        tensors = {
            f"gradient|{batch}|{number}|{place}": tensor
            for batch, gradients in self._gradients.items()
            for (number, place), tensor in gradients.items()
        }
        for path, statistics in self._open.items():
            for up, statistic in statistics.items():
                tensors |= {f"statistic|{path}|{up}|{name}": t for name, t in statistic.tensors().items()}
        self._shelf.write(self._name, tensors, [self._left[batch] for batch in sorted(self._left)])

    def _take_up(self) -> bool:
        found = self._shelf.read(self._name)
        if found is None:
            return False
        self._kept, left = found
        self._left = dict(enumerate(left))
        self._gradients = {batch: {} for batch in self._left}
        for name, tensor in self._kept.items():
            if name.startswith("gradient|"):
                _, batch, number, place = name.split("|")
                self._gradients[int(batch)][int(number), int(place)] = tensor
        return True
