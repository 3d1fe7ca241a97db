"""The finder leaves everything as it found it, and never spells out a weight."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny_models import tiny
from torch import nn

from hf_geglu.sites import find_sites


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model that a search might disturb, tensors by identity, version and value."""
    return {
        name: (
            id(module),
            type(module),
            module.training,
            {key: id(value) for key, value in module.__dict__.items()},
            {key: list(value) for key, value in module.__dict__.items() if key.endswith("_hooks") and value},
            {
                key: (id(t), t._version, t.requires_grad, t.grad)
                for key, t in module._parameters.items()
                if t is not None
            },
            {key: (id(t), t._version) for key, t in module._buffers.items() if t is not None},
            list(module._modules),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "opt", "t5", "swin", "wav2vec2-conformer", "albert"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model_type: str, training: bool) -> None:
    model = tiny(model_type).train(training)
    calls: list[str] = []
    model.get_submodule(next(n for n, m in model.named_modules() if isinstance(m, nn.Linear))).register_forward_hook(
        lambda *_: calls.append("hook")
    )
    next(model.parameters()).requires_grad_(False)
    config = model.config.to_dict()
    before, state = snapshot(model), {key: value.clone() for key, value in model.state_dict().items()}

    find_sites(model)

    assert snapshot(model) == before
    assert calls == []
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], state[key]) for key in state)


class Restless(nn.Module):
    """Draws from every generator, writes into a buffer and an attribute, and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.register_buffer("seen", torch.zeros(1))
        self.cache: list[torch.Tensor] = []
        self.count = 0

    def forward(self, x):
        torch.rand(1), random.random(), np.random.rand()
        self.seen += 1
        self.count += 1
        self.cache.append(x)
        return self.down(torch.relu(self.up(x)))


def test_generators_buffers_and_caches() -> None:
    model = Restless()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    assert len(find_sites(model)) == 1

    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert (model.seen.item(), model.count, model.cache) == (0, 0, [])


def test_gradient_mode_and_default_device_are_kept() -> None:
    with torch.no_grad():
        find_sites(tiny("bert"))
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert torch.empty(0).device.type == "cpu"


def test_a_search_is_repeatable() -> None:
    model = tiny("wav2vec2-conformer")
    torch.manual_seed(1)
    first = find_sites(model)
    torch.manual_seed(2)
    assert find_sites(model) == first


def test_an_undeepcopyable_attribute_and_a_reference_to_the_parent_do_no_harm() -> None:
    model = tiny("bert")
    expected = find_sites(model)
    layer = model.bert.encoder.layer[0]
    layer.__dict__["parent"] = model
    layer.__dict__["lock"] = __import__("threading").Lock()
    layer.__dict__["generator"] = (number for number in range(3))
    assert find_sites(model) == expected


def test_huge_blocks_are_probed_without_their_weights() -> None:
    with torch.device("meta"):
        block = nn.Sequential(nn.Linear(2**16, 2**18), nn.GELU(), nn.Linear(2**18, 2**16))
    (site,) = find_sites(block)
    assert (site.d_in, site.width) == (2**16, 2**18)


def test_accelerate_style_dispatch_is_looked_through() -> None:
    model = tiny("llama")
    expected = find_sites(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) or "mlp" in type(module).__name__.lower():
            module._old_forward = module.forward
            module._hf_hook = object()
            module.forward = lambda *args, **kwargs: pytest.fail("a hook of the original ran")
    assert find_sites(model) == expected
