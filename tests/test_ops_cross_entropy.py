"""Cross entropy without logits: equal to torch's for every type and option, and no less accurate."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_geglu.errors import KernelError
from hf_geglu.ops.cross_entropy import linear_cross_entropy

TOKENS, WIDTH, VOCABULARY = (3, 17), 24, 130


def plain(h: Tensor, w: Tensor, b: Tensor | None, y: Tensor, **options: Any) -> Tensor:
    """What models of transformers do: logits in the type of the weights, the loss in float32."""
    z = F.linear(h, w, b)
    z = (z if z.dtype == torch.float64 else z.float()) * options.get("logit_scale", 1.0)
    cap = options.get("logit_softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    items = options.get("num_items_in_batch")
    loss = F.cross_entropy(
        z.flatten(0, -2),
        y.flatten(),
        label_smoothing=options.get("label_smoothing", 0.0),
        reduction="sum" if items else options.get("reduction", "mean"),
    )
    return loss / items if items else loss


def ours(h: Tensor, w: Tensor, b: Tensor | None, y: Tensor, **options: Any) -> Tensor:
    return linear_cross_entropy(h, w, y, bias=b, **options)


def example(*, bias: bool = True, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    y = torch.randint(0, VOCABULARY, TOKENS, generator=generator)
    y[torch.rand(TOKENS, generator=generator) < ignored] = -100
    return normal(*TOKENS, WIDTH), normal(VOCABULARY, WIDTH), normal(VOCABULARY) if bias else None, y


def results(function: Any, parts: Any, *types: torch.dtype, **options: Any) -> list[Tensor]:
    """Loss and gradients, of the parts rounded to the first of the types and computed in the last."""
    *tensors, y = parts
    for dtype in types:
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    loss = function(*tensors, y, **options)
    return [loss.detach(), *torch.autograd.grad(loss, [t for t in tensors if t is not None])]


OPTIONS = [
    {"reduction": reduction, "label_smoothing": smoothing, "chunk_tokens": chunk, **head}
    for reduction, smoothing, chunk, head in itertools.product(
        ("mean", "sum"),
        (0.0, 0.1),
        (None, 7),
        ({}, {"logit_scale": 0.25}, {"logit_softcap": 5.0}, {"logit_scale": 2.0, "logit_softcap": 8.0}),
    )
]


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_to_torch_and_no_less_accurate(dtype: torch.dtype, bias: bool, ignored: float) -> None:
    parts = example(bias=bias, ignored=ignored)
    for options in [*OPTIONS, {"num_items_in_batch": 11}, {"num_items_in_batch": torch.tensor(11)}]:
        exact = results(plain, parts, dtype, torch.float64, **options)
        torch_s, own = (results(function, parts, dtype, **options) for function in (plain, ours))
        for truth, other, found in zip(exact, torch_s, own, strict=True):
            assert found.dtype == other.dtype
            if dtype == torch.float64:
                torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
            else:
                error, allowed = ((t.double() - truth).norm() for t in (found, other))
                assert error <= 2 * allowed + 1e-6 * truth.norm(), options


def test_nothing_to_score() -> None:
    parts = example(ignored=1.0)
    for reduction in ("mean", "sum"):
        for other, found in zip(
            *(results(f, parts, torch.float32, reduction=reduction) for f in (plain, ours)), strict=True
        ):
            torch.testing.assert_close(found, other, equal_nan=True)
    h, w, _, y = parts
    assert linear_cross_entropy(h[:0], w, y[:0], reduction="sum") == 0.0


@pytest.mark.parametrize("vocabulary", [50, 40_000])
def test_chunks_add_up(vocabulary: int) -> None:
    """Many chunks, strips and rows at a time, in both ways of summing the gradient of the weight."""
    torch.manual_seed(0)
    h, w = torch.randn(90, 16, dtype=torch.float64), torch.randn(vocabulary, 16, dtype=torch.float64)
    parts = (h, w, None, torch.randint(0, vocabulary, (90,)))
    for dtype, chunk in itertools.product((torch.float64, torch.bfloat16), (1, 30, 89, 1000)):
        exact = results(plain, parts, dtype, torch.float64)
        other, found = results(plain, parts, dtype), results(ours, parts, dtype, chunk_tokens=chunk)
        for truth, theirs, own in zip(exact, other, found, strict=True):
            error, allowed = ((t.double() - truth).norm() for t in (own, theirs))
            assert error <= 2 * allowed + 1e-12 * truth.norm()


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    linear = F.linear  # a mode does not reach into a custom op, so it is switched on inside

    def watched(*args: Any) -> Tensor:
        watch.__enter__()
        return linear(*args)

    watch = Watch()
    monkeypatch.setattr(F, "linear", watched)
    h, w = torch.randn(512, 8, requires_grad=True), torch.randn(3000, 8, requires_grad=True)
    try:
        linear_cross_entropy(h, w, torch.randint(0, 3000, (512,)), chunk_tokens=256).backward()
    finally:
        for _ in range(2):
            watch.__exit__(None, None, None)
    assert max(sizes) == 256 * 3000
    assert len(sizes) > 20


@pytest.mark.parametrize("frozen", list(itertools.product([True, False], repeat=3)), ids=str)
def test_frozen_parts_get_no_gradient(frozen: tuple[bool, ...]) -> None:
    h, w, b, y = example()
    parts = [t.float().requires_grad_(not still) for t, still in zip((h, w, b), frozen, strict=True)]
    loss = linear_cross_entropy(parts[0], parts[1], y, bias=parts[2])
    assert loss.requires_grad == (not all(frozen))
    if loss.requires_grad:
        loss.backward()
    assert [part.grad is None for part in parts] == list(frozen)
    torch.testing.assert_close(loss, plain(*parts, y))


def test_a_tied_weight() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (2, 9))
    gradients = []
    for function in (plain, ours):
        embedding = nn.Embedding(VOCABULARY, WIDTH, _weight=example()[1].float())
        function(embedding(ids).tanh(), embedding.weight, None, ids.roll(-1, 1)).backward()
        gradients.append(embedding.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_loss_that_is_scaled_and_backward_again() -> None:
    h, w, b, y = (t if t.dtype == torch.int64 else t.float().requires_grad_() for t in example())
    loss = linear_cross_entropy(h, w, y, bias=b) * 3.0
    first = torch.autograd.grad(loss, (h, w, b), retain_graph=True)
    second = torch.autograd.grad(loss, (h, w, b))
    for one, two, expected in zip(first, second, torch.autograd.grad(plain(h, w, b, y) * 3.0, (h, w, b)), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, expected)


def test_autocast_keeps_the_gradient_of_a_float32_weight() -> None:
    parts = example()
    exact = results(plain, parts, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other, found = (results(function, parts, torch.float32) for function in (plain, ours))
    for truth, theirs, own in zip(exact, other, found, strict=True):
        assert own.dtype == theirs.dtype == torch.float32
        error, allowed = ((t.double() - truth).norm() for t in (own, theirs))
        assert 1e-5 * truth.norm() < error <= 2 * allowed  # in 16 bits, that is


def test_a_second_derivative_is_refused() -> None:
    h, w, b, y = (t if t.dtype == torch.int64 else t.requires_grad_() for t in example())
    (gradient,) = torch.autograd.grad(linear_cross_entropy(h, w, y, bias=b), h, create_graph=True)
    with pytest.raises(KernelError, match=r"second derivative.*cross_entropy"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 17, 23)}, "expected .*D.* and .*V, D"),
        ({"labels": torch.zeros(3, 16, dtype=torch.int64)}, "one label a token"),
        ({"labels": torch.zeros(3, 17)}, "expected int64"),
        ({"labels": torch.full((3, 17), VOCABULARY)}, f"labels from {VOCABULARY} to {VOCABULARY}"),
        ({"labels": torch.full((3, 17), -1)}, "labels from -1"),
        ({"bias": torch.zeros(3)}, "one number an output"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"logit_softcap": 0.0}, "positive bound"),
        ({"reduction": "none"}, "'mean' or 'sum'"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    h, w, b, y = (t if t.dtype == torch.int64 else t.float() for t in example())
    call = {"hidden": h, "weight": w, "labels": y, "bias": b, **change}
    with pytest.raises(KernelError, match=message):
        linear_cross_entropy(**call)


def test_the_custom_op_keeps_its_contract() -> None:
    """Schema, fake implementation and autograd registration, as torch checks them."""
    h, w, b, y = (t if t.dtype == torch.int64 else t.float().requires_grad_() for t in example())
    share = torch.ones(())
    for chunk, needs in ((None, (True, True, True)), (5, (True, False, True))):
        torch.library.opcheck(
            torch.ops.hf_geglu.linear_cross_entropy.default,
            (h.flatten(0, 1), w, b, y.flatten(), share, torch.float32, -100, 0.1, 1.0, 5.0, chunk, *needs),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


def test_it_is_traced_whole() -> None:
    parts = example()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for expected, found in zip(*(results(f, parts, torch.float32) for f in (ours, compiled)), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_scaled_loss_takes_no_second_gradient_of_the_weight():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    labels = torch.arange(6)

    def loss():
        return linear_cross_entropy(hidden, weight, labels) * 0.25

    kept = loss()
    first = torch.autograd.grad(kept, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(kept, (hidden, weight))
    assert all(map(torch.equal, first, again))

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            answer = function(*args, **(kwargs or {}))
            if isinstance(answer, torch.Tensor) and not function._schema.is_mutable:
                made.append(answer.numel())
            return answer

    made = []
    value = loss()
    with Sizes():
        found = torch.autograd.grad(value, (hidden, weight))
    assert max(made, default=0) < weight.numel()
    assert all(map(torch.equal, first, found))
