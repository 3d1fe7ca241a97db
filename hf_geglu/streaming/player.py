"""Runs a model from layer to layer for many batches at once, so that each layer's weights are read once for all.

A forward cannot be halted in the middle. So it is begun again: units that have been called before hand out what they
returned then, the one whose weights are in memory is run, and where another one is called the forward is left. What
stands between layers is computed anew each time; it is little beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hf_geglu.distance import Outputs, outputs_of
from hf_geglu.errors import StreamError
from hf_geglu.inputs import Inputs
from hf_geglu.modes import evaluating
from hf_geglu.streaming.nested import Nested, tensors_in, with_tensors
from hf_geglu.streaming.residency import Residency
from hf_geglu.streaming.tape import Call, Tape
from hf_geglu.streaming.units import Unit

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Conductor = Callable[[int, Unit, Callable[..., Nested], Arguments], Nested]
"""Answers a call: takes its number in this forward, the unit, its own forward, and the arguments."""

Dress = Callable[[Unit], AbstractContextManager[None]]
"""Changes a unit whose weights are in memory, for as long as they are."""


class _Left(BaseException):
    """A forward is left; no error, so that nobody catches it."""


class Player:
    """Plays batches on a model.

    Args:
        residency: the model and where its weights come from.
        batches: keyword arguments of one forward each.
        tape: what is kept of them.
        dress: see `Dress`.
    """

    def __init__(self, residency: Residency, batches: Sequence[Inputs], tape: Tape, dress: Dress | None = None) -> None:
        self.residency, self.batches, self.tape = residency, batches, tape
        self.units = {unit.path: unit for unit in residency.units.units}
        self._dress: Dress = dress or (lambda unit: nullcontext())
        self._conductor: Conductor | None = None
        self._number = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The units' calls come to this player inside; the model is in eval mode."""
        with evaluating(self.residency.model), ExitStack() as stack:
            for unit in self.units.values():
                unit.module.forward = partial(self._called, unit, unit.module.forward)
                stack.callback(unit.module.__dict__.pop, "forward")
            yield

    def _called(self, unit: Unit, run: Callable[..., Nested], *args: Any, **kwargs: Any) -> Nested:
        if self._conductor is None:  # inside of another unit that is being run
            return run(*args, **kwargs)
        number, self._number = self._number, self._number + 1
        conductor, self._conductor = self._conductor, None
        try:
            return conductor(number, unit, run, (args, kwargs))
        finally:
            self._conductor = conductor

    def _run(self, batch: int, conductor: Conductor) -> Outputs | None:
        """One forward; None where it was left."""
        self._conductor, self._number = conductor, 0
        try:
            with _WeightsAreThere(self.residency):
                return outputs_of(self.residency.model, self._inputs(batch))
        except _Left:
            return None
        except RuntimeError as error:
            if not ("leaf" in str(error) and "in-place" in str(error)):
                raise
            raise StreamError(_refusal(f"it writes into what a layer returned ({error})")) from error
        finally:
            self._conductor = None

    def _inputs(self, batch: int) -> Inputs:
        dtype = next(self.residency.model.parameters()).dtype
        return {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in self.batches[batch].items()
        }

    @contextmanager
    def holding(self, unit: Unit) -> Iterator[None]:
        """The weights of a unit are in memory, dressed."""
        with self.residency.holding(unit), self._dress(unit):
            yield

    def play(
        self, finished: Callable[[int, Outputs], None], progress: Callable[[str, int], None] = lambda unit, batch: None
    ) -> None:
        """Run all batches to their ends, one layer after the other.

        What layers return is kept, with what came before them. What follows the last layer is not: it can be run again.

        Args:
            finished: called with the number of a batch and its outputs.
            progress: called before a batch runs on, with the layer whose weights are in memory.
        """
        left = set(range(len(self.batches)))
        wanted: dict[int, str] = dict.fromkeys(left, "")
        while left:
            here = wanted[min(left, key=lambda batch: (len(self.tape.units(batch)), batch))]
            with ExitStack() as held, torch.no_grad():
                if here:
                    held.enter_context(self.holding(self.units[here]))
                there = {here}
                for batch in sorted(batch for batch in left if wanted[batch] == here):
                    progress(here, batch)
                    outputs, wanted[batch] = self._advance(batch, here, there, held)
                    if outputs is not None:
                        finished(batch, outputs)
                        left.discard(batch)
                    del outputs

    def _advance(self, batch: int, here: str, there: set[str], held: ExitStack) -> tuple[Outputs | None, str]:
        known = len(self.tape.units(batch))
        new: list[Call] = []
        kept = 0
        wanted = ""

        def conduct(number: int, unit: Unit, run: Callable[..., Nested], given: Arguments) -> Nested:
            nonlocal kept, wanted
            if number < known:
                return self.tape.returned(batch, number)
            if unit.layer and unit.path != here:
                kept, wanted = len(new), unit.path
                raise _Left
            if unit.path not in there:
                held.enter_context(self.holding(unit))
                there.add(unit.path)
            returned = run(*given[0], **given[1])
            new.append(Call(unit.path, with_tensors(returned, torch.clone)))
            kept = len(new) if unit.layer else kept
            return returned

        outputs = self._run(batch, conduct)
        self.tape.append(batch, new[:kept])
        return outputs, wanted

    def arguments(
        self, batch: int, call: int, hand_out: Callable[[int, Nested], Nested] = lambda number, returned: returned
    ) -> Arguments:
        """What a call that was kept is given.

        Args:
            batch: number of the batch.
            call: number of the call.
            hand_out: what to hand out for an earlier call, given its number and what it returned.
        """
        found: list[Arguments] = []

        def conduct(number: int, unit: Unit, run: Callable[..., Nested], given: Arguments) -> Nested:
            if number == call:
                found.append(given)
                raise _Left
            return hand_out(number, self.tape.returned(batch, number))

        self._run(batch, conduct)
        return found[0]

    def outputs(
        self, batch: int, hand_out: Callable[[int, Nested], Nested], held: ExitStack, there: set[str]
    ) -> Outputs:
        """The model's outputs: kept calls are handed out, what follows them is run.

        Args:
            batch: number of the batch.
            hand_out: as in `arguments`.
            held: where units are held that are run, until it closes.
            there: paths of the units that are.
        """
        known = len(self.tape.units(batch))

        def conduct(number: int, unit: Unit, run: Callable[..., Nested], given: Arguments) -> Nested:
            if number < known:
                return hand_out(number, self.tape.returned(batch, number))
            if unit.path not in there:
                held.enter_context(self.holding(unit))
                there.add(unit.path)
            return run(*given[0], **given[1])

        found = self._run(batch, conduct)
        assert found is not None
        return found

    def call(self, unit: Unit, given: Arguments) -> Nested:
        """Run a unit that is held by itself."""
        with _WeightsAreThere(self.residency):
            return unit.module(*given[0], **given[1])


class _WeightsAreThere(TorchFunctionMode):
    """Computes with no weight that is not in memory: torch multiplies by a tensor of the meta device without a word,
    and the product is noise. What stands alone and is read without being called (queries of a detector, a head written
    as a product) is fetched, and stays."""

    _LOOKS = frozenset({"size", "dim", "numel", "stride", "is_floating_point", "element_size"})
    _VIEWS = frozenset({"T", "mT", "H", "mH", "data", "real"})

    def __init__(self, residency: Residency) -> None:
        super().__init__()
        self._residency = residency

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        property_name = getattr(getattr(func, "__self__", None), "__name__", "")
        looks = name in self._LOOKS or (name == "__get__" and property_name not in self._VIEWS)
        if not looks and any(tensor.is_meta for tensor in tensors_in((args, kwargs or {}))):
            args, kwargs = with_tensors(args, self._there), with_tensors(kwargs or {}, self._there)
        return func(*args, **(kwargs or {}))

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        found = self._residency.fetched(tensor) if tensor.is_meta else tensor
        if found is None:
            raise StreamError(_refusal("it reads the weights of a layer without calling it"))
        return found


def _refusal(reason: str) -> str:
    return (
        f"the model cannot be run layer by layer: {reason}. Calibrate in memory instead: hf_geglu.convert(model, "
        "calibration=...)"
    )
