"""What happens inside a probe twin when it is run: which projection was called with what, and what each activation
heard.

No product with a weight is ever computed. Every projection of the twin answers with wide random values of its own, so
the weights never matter, and whatever enters a later projection can be compared with what the earlier ones said.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_geglu.sites.projections import Form, Port, read_port
from hf_geglu.sites.twin import SMALL

MOST_HELD = 50_000_000
"""How many numbers a run may leave behind (0.4 GB); a block, however wide, needs a few thousand tokens of it."""

STUB_FORMS = 5
"""How many forms the answer of a stub can take: tensor, then tuples of 2, 1, 3 and 4 that start with it."""


class ProbeError(RuntimeError):
    """The twin did something that a probe cannot follow; the message becomes part of a rejection."""


class WidthError(ProbeError):
    """A projection was given a tensor of another width than it reads."""

    def __init__(self, path: str, x: torch.Tensor, wanted: int) -> None:
        super().__init__(f"{path} expects width {wanted} and was given {tuple(x.shape)}")
        self.x = x
        self.wanted = wanted


@dataclass(slots=True, eq=False)
class Call:
    """One call of a projection: what went in (with its history for autograd) and the random leaf that came out."""

    path: str
    port: Port
    x: torch.Tensor
    out: torch.Tensor
    at: int
    """How many results there were before it."""


@dataclass(slots=True, eq=False)
class Heard:
    """One call of something that may be an activation: a module without projections, or a function in an attribute."""

    path: str
    x: torch.Tensor
    y: torch.Tensor


@dataclass(slots=True)
class Rehearsal:
    """Plays a conversion through: `wide` answers twice as wide, and the attribute at `substitute` gives new values,
    half as many in `dim`; with `hush` they are zero at the middle position."""

    substitute: str
    wide: str | None
    dim: int
    hush: bool
    given: list[torch.Tensor] = field(default_factory=list)


class Stub(nn.Module):
    """Takes the place of a child that is already understood; answers with noise shaped like its first tensor."""

    def __init__(self, trace: Trace, path: str) -> None:
        super().__init__()
        self.trace = trace
        self.path = path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Imitate the first tensor among the arguments, in the form that is being tried for this stub."""
        self.trace.last_stub = self.path
        like = next(
            (a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.is_floating_point()), None
        )
        if like is None:
            raise ProbeError(f"{self.path} was called without a tensor")
        x = self.trace.noise(like.shape)
        form = self.trace.forms.get(self.path, 0)
        return (x, (x, x), (x,), (x, x, None), (x, x, None, None))[form]


class Trace(TorchFunctionMode):
    """Attached to a twin, records its calls; entered, keeps products with large stand-in weights from being
    computed."""

    def __init__(
        self, *, forms: dict[str, int] | None = None, rehearsal: Rehearsal | None = None, recording: bool = True
    ) -> None:
        super().__init__()
        self._recording = recording
        self.calls: list[Call] = []
        self.heard: list[Heard] = []
        self.inputs: list[torch.Tensor] = []
        """What the block was called with: leaves, of which it got copies."""
        self.results: list[torch.Tensor] = []
        self.limits: dict[float, None] = {}
        """Numbers that the modules hold, any of which may be what they clamp at."""
        self.forms = forms if forms is not None else {}
        self.last_stub: str | None = None
        self._rehearsal = rehearsal
        self._generator = torch.Generator().manual_seed(1)
        self._taps: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}
        self._stacks: dict[int, str] = {}
        self._widths: set[int] = set()
        self._held = 0
        self._kept: list[torch.Tensor] = []

    def noise(self, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """N(0, 3), with every other value four times as large: wide enough to part gelu from gelu_10 and relu6."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu") * 3
        values.view(-1)[::2] *= 4
        return values

    def attach(self, twin: nn.Module, *, path: str = "") -> bool:
        """Wrap the projections and the possible activations below `twin`; returns whether it holds any projection."""
        port = read_port(twin)
        if port is not None:
            self._widths.add(port.d_in)
            twin.__dict__["forward"] = tap = partial(self._tap, twin, path, port)
            weight = twin._parameters.get("weight")
            if weight is not None:
                self._taps[id(weight)] = tap
            return True
        if isinstance(twin, Stub):
            return True
        for name, parameter in twin._parameters.items():
            if parameter is not None and parameter.ndim > 1:
                self._stacks[_storage(parameter)] = _join(path, name)
                self._widths.update(parameter.shape[-2:])
        holds = [
            self.attach(child, path=_join(path, name)) for name, child in twin._modules.items() if child is not None
        ]
        for name, value in list(twin.__dict__.items()):
            if type(value) is float and 1.0 < value < 1e3:
                self.limits[value] = None
            if name != "forward" and not name.startswith("_") and _is_function(value):
                twin.__dict__[name] = partial(self.hear, value, _join(path, name))
        if not any(holds) and path:
            twin.__dict__["forward"] = partial(self.hear, twin.forward, path)
        return any(holds)

    def _tap(self, twin: nn.Module, path: str, port: Port, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Stands for the forward of a projection."""
        widened = self._rehearsal is not None and self._rehearsal.wide == path
        if port.convolves:
            shape = _convolved(twin, x)
            if widened:
                channels = x.ndim - len(twin.kernel_size) - 1  # type: ignore[arg-type]
                shape = (*shape[:channels], 2 * shape[channels], *shape[channels + 1 :])
        elif x.shape[-1] != port.d_in:
            raise WidthError(path, x, port.d_in)
        else:
            shape = (*x.shape[:-1], port.d_out * (2 if widened else 1))
        self.last_stub = None  # whatever goes wrong from here on is not for the form of its answer
        return self._answer(path, port, x, shape)

    def _hold(self, *tensors: torch.Tensor) -> None:
        self._held += sum(tensor.numel() for tensor in tensors)
        if self._held > MOST_HELD:
            raise ProbeError("too large to be followed as one block")

    def hear(self, function: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> Any:
        """Stands for a possible activation: records tensor to tensor, passes everything else on."""
        x = args[0] if args else None
        before = x.detach().clone() if isinstance(x, torch.Tensor) and self._recording else None
        if before is not None and self._rehearsal is not None and self._rehearsal.substitute == path:
            shape = list(before.shape)
            if self._rehearsal.wide:
                shape[self._rehearsal.dim] //= 2
            given = self.noise(torch.Size(shape))
            if self._rehearsal.hush:
                positions = given.movedim(self._rehearsal.dim, -1)
                positions[tuple(extent // 2 for extent in positions.shape[:-1])] = 0.0
            self._rehearsal.given.append(given.requires_grad_())
            return given.clone()
        y = function(*args, **kwargs)
        if before is not None and isinstance(y, torch.Tensor):
            self.heard.append(Heard(path, before, y.detach().clone()))
        return y

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Route functional products with the weight of a projection to its tap, and refuse the other large ones."""
        if func in _PRODUCTS:
            if func is torch.nn.functional.linear and len(args) > 1 and id(args[1]) in self._taps:
                return self._taps[id(args[1])](args[0])
            path = self._stacks.get(_storage(args[1])) if func in _PAIRS and len(args) > 1 else None
            if path is not None and args[1].ndim > 1:
                return self._tap_stack(path, func, *args[:2])
            if any(_costly(argument) for argument in args) and not _filters(func, args):
                raise ProbeError("a product with a large weight outside any projection module")
        if not self._recording and func is torch.nn.functional.scaled_dot_product_attention and len(args) > 2:
            # of a whole model only the shapes count, and attention over a long signal would take minutes
            return self.noise((*args[0].shape[:-1], args[2].shape[-1]))
        answer = func(*args, **(kwargs or {}))
        if func in _SELECTIONS and _storage(args[0]) in self._stacks and _storage(answer) not in self._stacks:
            # a copy of some of the matrices; kept, so that no other tensor gets its place in memory
            self._stacks[_storage(answer)] = self._stacks[_storage(args[0])]
            self._kept.append(answer)
        if self._may_enter_a_projection(answer):  # the rest may be large
            self.results.append(answer)
            self._hold(answer)
        return answer

    def _may_enter_a_projection(self, answer: Any) -> bool:
        if not self._recording or not isinstance(answer, torch.Tensor) or not answer.requires_grad or not answer.ndim:
            return False
        return not self._widths.isdisjoint((answer.shape[-1], answer.shape[min(1, answer.ndim - 1)]))

    def _tap_stack(self, path: str, func: Callable[..., Any], x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Stands for the product with a parameter, or a part of one, that belongs to no projection module."""
        shape = list(func(x.to("meta"), weight.to("meta")).shape)
        outputs_first = func is torch.nn.functional.linear
        d_in, d_out = (weight.shape[-1], weight.shape[-2]) if outputs_first else (weight.shape[-2], weight.shape[-1])
        stored_as_seen = weight.stride(-1) == 1
        form: Form = "stack" if outputs_first == stored_as_seen else "stack_transposed"
        if self._rehearsal is not None and self._rehearsal.wide == path:
            shape[-1] *= 2
        self.last_stub = None
        return self._answer(path, Port(d_in, d_out, form), x, tuple(shape))

    def said(self, path: str, port: Port, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """What a projection answers with."""
        del path, port, x
        return self.noise(shape)

    def _answer(self, path: str, port: Port, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        out = self.said(path, port, x, shape)
        if not self._recording:
            return out
        out.requires_grad_()
        self._hold(x, out)
        self.calls.append(Call(path, port, x.clone(), out, len(self.results)))
        return out.clone()  # an in-place activation may write into it


MOST_SPELLED = 1_000_000
"""The largest filter that is spelled out in memory (8 MB)."""

_CONVOLUTIONS = frozenset(
    {torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d},
)
_PRODUCTS = _CONVOLUTIONS | frozenset(
    {
        torch.nn.functional.linear,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.mm,
        torch.Tensor.mm,
        torch.bmm,
        torch.Tensor.bmm,
        torch.baddbmm,
        torch.addmm,
        torch.einsum,
    }
)


_PAIRS = _PRODUCTS - _CONVOLUTIONS - {torch.addmm, torch.baddbmm, torch.einsum}
"""Products whose second argument is the weight."""
_SELECTIONS = frozenset(
    {
        torch.Tensor.__getitem__,
        torch.index_select,
        torch.Tensor.index_select,
        torch.Tensor.float,
        torch.Tensor.to,
        torch.Tensor.type,
    }
)
"""What copies a weight, or some of it."""


def _storage(value: Any) -> int:
    """Which memory a tensor looks at; 0 for anything else."""
    if not isinstance(value, torch.Tensor) or value.device.type == "meta":
        return 0
    return value.untyped_storage().data_ptr()


def _costly(value: Any) -> bool:
    """Whether a tensor is one number seen from many indices: a product would first spell it out in memory."""
    if not isinstance(value, torch.Tensor) or value.numel() <= SMALL or value.device.type == "meta":
        return False
    return value.untyped_storage().nbytes() < value.numel()


def _filters(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether it is a convolution of each channel by itself with a filter that belongs to no module (an anti-aliasing
    one): that costs little, however many channels see the same filter."""
    return func in _CONVOLUTIONS and len(args) > 1 and args[1].shape[1] == 1 and args[1].numel() <= MOST_SPELLED


def _convolved(twin: nn.Module, x: torch.Tensor) -> tuple[int, ...]:
    """The shape a convolution would answer with, computed on the meta device: right for subclasses and paddings too."""
    kept = dict(twin._parameters)
    for name, parameter in kept.items():
        if parameter is not None:
            twin._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    try:
        answer: torch.Tensor = type(twin).forward(twin, x.detach().to("meta"))
    finally:
        twin._parameters.update(kept)
    return tuple(answer.shape)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_function(value: Any) -> bool:
    """Functions, partials and callables of torch that an attribute may hold; neither classes nor modules."""
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial))
