"""The head of a model is told by what it does; with the loss in it nothing else of a training changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from tiny_training import bert, gpt2, llama, one_thread, random_blocks, same_weights  # noqa: F401
from torch import nn
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("accelerate")

from hf_geglu.training import CausalLM, CheckpointFolder, MaskedLM, TrainSettings, evaluate, train
from hf_geglu.training.evaluation import summed_nll
from hf_geglu.training.objectives.head import Head, NoHead, find_head
from hf_geglu.training.objectives.tied import tied_gradient

MLM = MaskedLM(mask_token_id=4, vocab_size=96, special_ids=frozenset(range(6)), probability=0.3, pad_token_id=5)
CAPPED = {"final_logit_softcapping": 7.0}


def granite() -> nn.Module:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GraniteForCausalLM(GraniteConfig(vocab_size=64, num_key_value_heads=1, logits_scaling=8.0, **sizes)).eval()


@pytest.mark.parametrize(
    ("build", "scale", "softcap"),
    [
        (gpt2, 1.0, None),
        (llama, 1.0, None),
        (bert, 1.0, None),  # with a bias, and behind a transform
        (lambda: tiny("opt"), 1.0, None),
        (lambda: tiny("gptj"), 1.0, None),
        (lambda: tiny("modernbert"), 1.0, None),
        (lambda: tiny("gemma2", **CAPPED), 1.0, 7.0),
        (granite, 0.125, None),
        (lambda: tiny("llama").to(torch.bfloat16), 1.0, None),
    ],
    ids=["gpt2", "llama", "bert", "opt", "gptj", "modernbert", "gemma2", "granite", "bfloat16"],
)
def test_found_by_what_it_does(build: Any, scale: float, softcap: float | None) -> None:
    model = build()
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    head = find_head(model)
    assert isinstance(head, Head), head
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))
    assert same_weights(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(head.linear)
    ids = torch.arange(24).reshape(2, 12)
    labels = ids.roll(-1, 1).masked_fill(ids % 5 == 0, -100)
    results = []
    for how in (NoHead("for comparison"), head):
        model.zero_grad()
        loss = summed_nll(model, {"input_ids": ids, "labels": labels}, how, divisor=7.0)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    coarse = next(model.parameters()).dtype == torch.bfloat16
    for plain, own in zip(*results, strict=True):
        close = {"rtol": 0.05, "atol": 0.02 * float(plain.abs().max())} if coarse else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(own, plain, **close)


class Odd(nn.Module):
    """A llama whose logits are made in some other way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = llama(), how

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, input_ids: torch.Tensor) -> Any:
        if self.how == "another product":
            hidden = self.inner.model(input_ids).last_hidden_state
            return (nn.functional.linear(hidden, self.inner.lm_head.weight),)
        output = self.inner(input_ids)
        logits = output.logits
        if self.how == "some columns masked":
            logits = torch.cat([logits[..., :-4], torch.full_like(logits[..., -4:], -30.0)], dim=-1)
        elif self.how == "normalized":
            logits = logits.log_softmax(-1)
        elif self.how == "a shift":
            logits = logits + 1.0
        elif self.how == "the last token only":
            logits = logits[:, -1:]
        elif self.how == "twice":
            logits = logits + self.inner(input_ids).logits
        return (logits,)


@pytest.mark.parametrize(
    "how",
    ["another product", "some columns masked", "normalized", "a shift", "the last token only", "twice"],
)
def test_whatever_else_a_model_does_is_refused(how: str) -> None:
    model = Odd(how).eval()
    assert isinstance(found := find_head(model), NoHead)
    assert found.reason


def test_wrapped_hooked_and_compiled_heads_are_left_alone() -> None:
    model = llama()
    hook = model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    assert "hooked" in find_head(model).reason  # type: ignore[union-attr]
    hook.remove()
    assert isinstance(find_head(model), Head)
    model.lm_head = nn.Sequential(model.lm_head)
    assert "a Sequential that is wrapped" in find_head(model).reason  # type: ignore[union-attr]
    assert "compiled" in find_head(torch.compile(llama())).reason  # type: ignore[union-attr,arg-type]
    assert "no output projection" in find_head(nn.Linear(2, 2)).reason  # type: ignore[union-attr]


def test_a_hook_that_comes_later_is_heard() -> None:
    model = llama()
    head = find_head(model)
    heard = []
    model.lm_head.register_forward_hook(lambda module, args, output: heard.append(output.shape))
    batch = {"input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None]}
    summed_nll(model, batch, head)
    assert heard == [(1, 6, 96)]


def settings(**changed: Any) -> TrainSettings:
    return TrainSettings(**{"max_steps": 5, "learning_rate": 1e-3, "use_cpu": True, **changed})


@pytest.mark.parametrize(("build", "objective"), [(gpt2, CausalLM()), (bert, MLM)], ids=["clm", "mlm"])
@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_a_training_has_the_same_losses_either_way(build: Any, objective: Any, mixed: Any) -> None:
    blocks, held = random_blocks(12), random_blocks(3, seed=1)
    results = [
        train(build(), blocks, held, settings(chunked_cross_entropy=how, mixed_precision=mixed), objective=objective)
        for how in ("off", "auto")
    ]
    off, auto = ([*result.losses, *(record.nll for record in result.evals)] for result in results)
    assert auto == pytest.approx(off, rel=2e-6 if mixed == "no" else 2e-2)
    assert auto != off  # otherwise both were the plain way


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    blocks = random_blocks(10)
    how = settings(max_steps=4, save_steps=2)
    whole, resumed = gpt2(dropout=0.2), gpt2(dropout=0.2)
    expected = train(whole, blocks, None, how, checkpoints=CheckpointFolder(tmp_path, keep=0))
    result = train(resumed, blocks, None, how, resume_from=tmp_path / "checkpoint-2")
    assert result.losses == expected.losses
    assert same_weights(whole, resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [gpt2, bert, lambda: tiny("llama", tie_word_embeddings=True, pad_token_id=3)])
def test_a_tied_gradient_is_made_once(build: Any, dtype: torch.dtype) -> None:
    """As exactly as when it is made twice, several times over the same tokens, and nothing else is large."""
    model = build().double()
    ids = torch.arange(96).reshape(4, 24) % 7
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}

    def gradient(of: nn.Module, *, once: bool) -> torch.Tensor:
        head = find_head(of)
        assert isinstance(head, Head)
        weight = head.linear.weight
        with tied_gradient(of, head if once else NoHead("for comparison")) as found:
            head = found if isinstance(found, Head) else head
            assert (head.weight_by is not None) == once
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
                for _ in range(2):  # the second time it is added to the first
                    summed_nll(of, batch, head, divisor=50.0).backward()
        shape = list(weight.shape)
        sums = [e for e in seen.events() if e.name == "aten::add_" and e.input_shapes[0] == shape]
        assert len(sums) == (1 if once else 3)  # of the two passes; and in each
        assert "forward" not in vars(of.get_input_embeddings())  # type: ignore[operator]
        assert weight.grad is not None
        return weight.grad.double()

    exact = gradient(copy.deepcopy(model), once=False)
    found, before = (gradient(copy.deepcopy(model).to(dtype), once=once) for once in (True, False))
    assert (found - exact).norm() < 1.5 * (before - exact).norm() + 1e-12


def test_no_part_of_a_tied_gradient_is_lost() -> None:
    """Where a backward goes by the embedding, or by the projection."""
    model = gpt2()
    ids = torch.arange(12)[None]
    embedded = model.get_input_embeddings()(ids).detach()
    weight = model.get_input_embeddings().weight
    with tied_gradient(model, find_head(model)) as head:
        assert isinstance(head, Head)
        for inputs in ({"inputs_embeds": embedded}, {"input_ids": ids}):
            found = []
            for given in (head, NoHead("for comparison")):
                model.zero_grad()
                summed_nll(model, {**inputs, "labels": ids}, given).backward()
                assert weight.grad is not None
                found.append(weight.grad.clone())
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    frozen = gpt2()
    frozen.get_input_embeddings().weight.requires_grad_(False)
    for other in (frozen, tiny("llama")):  # frozen, untied
        plain = find_head(other)
        with tied_gradient(other, plain) as head:
            assert head is plain


def test_evaluation_finds_the_head_itself() -> None:
    model, blocks = llama(), random_blocks(5)
    assert evaluate(model, blocks).nll == pytest.approx(evaluate(model, blocks, head=NoHead("")).nll, rel=1e-6)
