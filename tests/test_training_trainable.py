"""Freezing: what is not asked for does not move by a bit, in packed layouts too; learning rates of parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_training import bert, gpt2, llama, one_thread, random_blocks  # noqa: F401
from torch import nn

pytest.importorskip("accelerate")

import hf_geglu
from hf_geglu.errors import ConfigurationError
from hf_geglu.training import CausalLM, MaskedLM, TrainSettings, train
from hf_geglu.training.parameters.trainable import choose_trainable, value_masks
from hf_geglu.training.updates.optimizer import rate_factors

MLM = MaskedLM(mask_token_id=4, vocab_size=96, special_ids=frozenset(range(6)), probability=0.3, pad_token_id=5)


def settings(**changed: Any) -> TrainSettings:
    return TrainSettings(**{"max_steps": 3, "learning_rate": 1e-2, "weight_decay": 0.1, "use_cpu": True, **changed})


def trained(model: nn.Module, objective: Any = None, **changed: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter before and after."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, random_blocks(9), None, settings(**changed), objective=objective)
    return {name: (before[name], parameter.detach()) for name, parameter in model.named_parameters()}


def moved(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return pair[0] != pair[1]


@pytest.mark.parametrize(("make", "objective"), [(gpt2, CausalLM()), (bert, MLM)], ids=["conv1d", "linear"])
def test_value_trains_the_value_half_of_a_packed_projection_alone(make: Any, objective: Any) -> None:
    model = make()
    hf_geglu.convert(model)
    masks = value_masks(model)
    for name, pair in trained(model, objective, trainable="value").items():
        expected = masks[name].expand_as(pair[0]).bool() if name in masks else torch.zeros_like(pair[0]).bool()
        assert torch.equal(moved(pair), expected & moved(pair)), name
        assert bool(moved(pair).any()) == (name in masks), name
    assert len(masks) == 4  # weight and bias of two blocks
    assert all(parameter.requires_grad for parameter in model.parameters())  # as it came
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_value_of_separate_projections_is_the_up_projection() -> None:
    changed = {name for name, pair in trained(llama(), trainable="value").items() if moved(pair).any()}
    assert changed == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)}


def test_ffn_trains_the_blocks_alone() -> None:
    changed = {name for name, pair in trained(llama(), trainable="ffn").items() if moved(pair).any()}
    assert changed == {
        f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in range(2) for part in ("gate", "up", "down")
    }


def test_what_was_frozen_stays_frozen() -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    changed = {name for name, pair in trained(model, trainable="value").items() if moved(pair).any()}
    assert changed == {"model.layers.1.mlp.up_proj.weight"}
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_a_dense_model_has_no_value_branch() -> None:
    with pytest.raises(ConfigurationError, match="no gated FFN block"):
        choose_trainable(gpt2(), "value")
    with pytest.raises(ConfigurationError, match="no packed gated block"):
        train(llama(), random_blocks(4), None, settings(value_learning_rate=1e-3))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_the_value_half_has_a_learning_rate_of_its_own(ratio: float) -> None:
    first, second = gpt2(), gpt2()
    for model in (first, second):
        hf_geglu.convert(model)
    masks = value_masks(first)
    plain = trained(first, max_steps=1)
    scaled = trained(second, max_steps=1, value_learning_rate=ratio * 1e-2)
    for name, (before, after) in plain.items():
        mask = masks.get(name, torch.zeros(())).expand_as(before).bool()
        assert torch.equal(scaled[name][1][~mask], after[~mask]), name
        torch.testing.assert_close(
            scaled[name][1][mask] - before[mask], ratio * (after[mask] - before[mask]), rtol=1e-3, atol=1e-7
        )


def test_lower_layers_learn_more_slowly() -> None:
    factors = rate_factors(llama(), 0.5)
    assert factors["model.embed_tokens.weight"] == 0.25
    assert factors["model.layers.0.mlp.up_proj.weight"] == 0.5
    assert factors["model.layers.1.self_attn.q_proj.weight"] == factors["model.norm.weight"] == 1.0
    steps = {}
    for decay in (1.0, 0.5):
        pairs = trained(llama(), max_steps=1, layerwise_lr_decay=decay, weight_decay=0.0)
        steps[decay] = {name: after - before for name, (before, after) in pairs.items()}
    for name, step in steps[1.0].items():
        torch.testing.assert_close(steps[0.5][name], factors[name] * step, rtol=1e-4, atol=1e-7)


def test_experts_lie_in_stacks() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 96}
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    masks = value_masks(model)
    if not masks:
        pytest.skip("this version keeps every expert in a module of its own")
    (name,) = masks
    pairs = trained(model, trainable="value", max_steps=2)
    assert {name for name, pair in pairs.items() if moved(pair).any()} == {name}
    assert torch.equal(moved(pairs[name]).any(2), masks[name].expand_as(pairs[name][0]).bool().any(2))
