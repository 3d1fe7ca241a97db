"""A unit as something that can be asked: say what its branches are, and see what it makes of them.

For a module, the answers of its projections are put in place of the products (the finder's twin and trace, see
`hf_geglu.sites`), so that weights never matter. A function, or a module without projections, is called as it is.

    N rows (tokens, positions), K width of a branch
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_geglu.sites.arguments import fill
from hf_geglu.sites.observe import recipes
from hf_geglu.sites.overheard import Arguments
from hf_geglu.sites.projections import Port, within
from hf_geglu.sites.running import Recipe
from hf_geglu.sites.stacks import stacks_of
from hf_geglu.sites.trace import Trace
from hf_geglu.sites.twin import Mold

Key = tuple[str, str, int]
"""("call", path of a projection, which of its calls), ("input", name, 0), ("answer", "", 0) or ("step", name, at)."""

ANSWER: Key = ("answer", "", 0)
INPUT: Key = ("input", "the input", 0)

ROWS, WIDTH = 24, 16
"""Of what a function is called with."""


@dataclass(slots=True, eq=False)
class Step:
    """One operation of a run."""

    name: str
    module: str
    """Path of the module without projections that it belongs to, "" where it is the unit's own."""
    y: Tensor


@dataclass(slots=True, eq=False)
class Outcome:
    """What one run showed; everything as (N, K)."""

    targets: dict[Key, Tensor]
    """What entered each projection, and the answer."""
    steps: list[Step] = field(default_factory=list)
    dtype: torch.dtype = torch.float64


class Askable(Protocol):
    """A unit that can be run with chosen branches."""

    sources: dict[Key, Tensor]
    """What may be chosen, (N, K), with what it was at first."""

    def run(self, values: Mapping[Key, Tensor], *, stepwise: bool = False) -> Outcome:
        """Run with these values, and those of `sources` for the rest."""
        ...


class _Asked(Trace):
    """A trace whose projections answer as they are told."""

    def __init__(self) -> None:
        super().__init__(recording=False)
        self.values: dict[Key, Tensor] = {}
        self.entered: dict[Key, Tensor] = {}
        self.ports: dict[Key, Port] = {}
        self.steps: list[Step] | None = None
        self._inside: list[str] = []

    def said(self, path: str, port: Port, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """As told; noise where nobody has said anything."""
        key = ("call", path, sum(known[1] == path for known in self.entered))
        self.entered[key], self.ports[key] = x.detach().clone(), port
        told = self.values.get(key)
        if told is None or told.numel() != torch.Size(shape).numel():
            told = self.values[key] = self.noise(shape) / 4
        return told.clone()

    def hear(self, function: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> Any:
        """Remembers which module is at work."""
        self._inside.append(path)
        try:
            return function(*args, **kwargs)
        finally:
            self._inside.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As in the finder, and keeps what each operation answered where that is asked for."""
        answer = super().__torch_function__(func, types, args, kwargs)
        if self.steps is not None and isinstance(answer, Tensor) and answer.is_floating_point() and answer.ndim > 1:
            name = getattr(func, "__name__", str(func)).strip("_")
            self.steps.append(Step(name, self._inside[-1] if self._inside else "", answer.detach().clone()))
        return answer


class ModuleReplay:
    """A module, run again and again on one twin. Raises whatever the module raises with this recipe."""

    def __init__(self, block: nn.Module, mold: Mold, recipe: Recipe) -> None:
        self._trace = _Asked()
        self._twin = mold.cast(block)
        self._trace.attach(self._twin)
        given = recipe.given
        if given is None:
            x = self._trace.noise(recipe.shape) / 4
            extra = self._unlike(x, fill(self._twin, x, recipe.filling))
            given = Arguments((), {}) if extra is None else Arguments((x,), extra)
        self._given = given
        self._images = any(port.convolves for _, _, port in within(block))
        first = self._played({}, stepwise=False)
        self.sources = {key: self._rows(value) for key, value in self._trace.values.items()}
        self._shapes = {key: value.shape for key, value in self._trace.values.items()}
        if given.args and isinstance(given.args[0], Tensor):
            self.sources[INPUT] = self._rows(given.args[0])
            self._shapes[INPUT] = given.args[0].shape
        self.entered = dict(self._trace.entered)
        """What each call of a projection read, in the first run."""
        self.dtype = first.dtype

    def _unlike(self, x: Tensor, extra: dict[str, Any] | None) -> dict[str, Any] | None:
        """Other arguments get numbers of their own, so that what is made of them is not taken for made of `x`."""
        for name, value in (extra or {}).items():
            if isinstance(value, Tensor) and value.shape == x.shape and torch.equal(value, x):
                extra[name] = self._trace.noise(x.shape) / 4  # type: ignore[index]
        return extra

    def run(self, values: Mapping[Key, Tensor], *, stepwise: bool = False) -> Outcome:
        """See `Askable`."""
        raw = {key: self._raw(value, self._shapes[key]) for key, value in {**self.sources, **values}.items()}
        return self._played(raw, stepwise=stepwise)

    def _played(self, raw: Mapping[Key, Tensor], *, stepwise: bool) -> Outcome:
        trace = self._trace
        trace.values = {key: value for key, value in raw.items() if key[0] == "call"}
        trace.entered, trace.steps = {}, [] if stepwise else None
        args, kwargs = self._given.fresh([])
        if INPUT in raw:
            args = (raw[INPUT].clone(), *args[1:])
        with trace, torch.no_grad():
            answer = _first_tensor(self._twin(*args, **kwargs))
        steps = [Step(one.name, one.module, self._rows(one.y)) for one in trace.steps or ()]
        targets = {key: self._rows(x) for key, x in trace.entered.items()}
        if answer is not None:
            targets[ANSWER] = self._rows(answer)
        return Outcome(targets, steps, torch.float64 if answer is None else answer.dtype)

    def _rows(self, tensor: Tensor) -> Tensor:
        moved = tensor.movedim(1, -1) if self._images and tensor.ndim > 2 else tensor
        return moved.reshape(-1, moved.shape[-1]).double() if moved.ndim else moved.reshape(1, 1).double()

    def _raw(self, rows_NK: Tensor, shape: torch.Size) -> Tensor:
        if not (self._images and len(shape) > 2):
            return rows_NK.reshape(shape)
        moved = (shape[0], *shape[2:], shape[1])
        return rows_NK.reshape(moved).movedim(-1, 1).contiguous()


class FunctionReplay:
    """A function of one tensor, or of two."""

    def __init__(self, function: Callable[..., Any], names: tuple[str, ...], dtype: torch.dtype) -> None:
        self._function, self._dtype = function, dtype
        generator = torch.Generator().manual_seed(1)
        self.sources: dict[Key, Tensor] = {
            ("input", name, 0): torch.randn(ROWS, WIDTH, generator=generator).bfloat16().double() for name in names
        }
        self.run({})

    def run(self, values: Mapping[Key, Tensor], *, stepwise: bool = False) -> Outcome:
        """See `Askable`."""
        tensors = [value.to(self._dtype) for value in {**self.sources, **values}.values()]
        spy = _Asked()
        spy.steps = [] if stepwise else None
        with spy, torch.no_grad():
            answer = _first_tensor(self._function(*(tensor.clone() for tensor in tensors)))
        if answer is None or answer.ndim == 0:
            raise TypeError("it does not answer with a tensor of several numbers")
        steps = [Step(one.name, one.module, one.y.reshape(-1, one.y.shape[-1]).double()) for one in spy.steps or ()]
        return Outcome({ANSWER: answer.reshape(-1, answer.shape[-1]).double()}, steps, answer.dtype)


def replays(block: nn.Module, mold: Mold) -> Iterator[ModuleReplay | Exception]:
    """Every way in which a module runs, the likeliest first, and what it raised in the others."""
    ports = [port for _, _, port in within(block)]
    stacks = stacks_of(block, "")
    widths = list(dict.fromkeys(port.d_in for port in ports)) + list(stacks.widths if stacks else ())
    for recipe in recipes(block, (), widths, stacks.experts if stacks else None):
        try:
            yield ModuleReplay(block, mold, recipe)
        except Exception as error:  # somebody else's code: whatever it has against these arguments
            yield error


def functions(function: Callable[..., Any], dtype: torch.dtype | None) -> Iterator[FunctionReplay | Exception]:
    """Every way in which a function of one or two tensors runs."""
    for names in _arguments(function):
        for kind in (torch.float64, torch.float32, torch.bfloat16) if dtype is None else (dtype,):
            try:
                yield FunctionReplay(function, names, kind)
            except Exception as error:  # somebody else's code
                yield error


def _arguments(function: Callable[..., Any]) -> tuple[tuple[str, ...], ...]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built in
        return (("z",), ("first", "second"))
    required = tuple(
        one.name for one in parameters if one.default is one.empty and one.kind <= one.POSITIONAL_OR_KEYWORD
    )
    return (required,) if len(required) in (1, 2) else (("z",), ("first", "second"))


def _first_tensor(answer: Any) -> Tensor | None:
    if isinstance(answer, Tensor):
        return answer.detach() if answer.is_floating_point() else None
    values = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, (tuple, list)) else ()
    return next((one for one in map(_first_tensor, values) if one is not None), None)
