"""The zoo: small models that are the same at every call, in which every part matters."""

import pytest
import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import hf_geglu
from benchmarks.zoo.building import NotBuiltError, build, model_types
from benchmarks.zoo.inputs import inputs_for
from benchmarks.zoo.overrides import CLASSES, COMPOSED, NOT_BUILT, OVERRIDES
from benchmarks.zoo.rules import small_depth, small_size, small_token
from benchmarks.zoo.weights import randomise
from hf_geglu.inputs import candidate_inputs, synthetic_inputs

NEW = "qwen4_exp" in CONFIG_MAPPING_NAMES


def test_the_same_model_at_every_call():
    one, other = build("bert").model, build("bert").model
    before, after = one.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("model_type", ["bert", "llama", "t5", "clip", "vit", "whisper", "mixtral"])
def test_small_and_alive(model_type):
    built = build(model_type)
    assert built.device == "cpu"
    assert built.parameters < 1_000_000
    for name, parameter in built.model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.abs().max() > 1e-3, name  # nothing is switched off
    with torch.no_grad():
        output = built.model(**inputs_for(built.model))
    assert torch.isfinite(output[0]).all()


def test_an_unknown_type():
    with pytest.raises(NotBuiltError, match="no model type 'nonsense'"):
        build("nonsense")


@pytest.mark.parametrize("model_type", sorted(set(NOT_BUILT) & set(CONFIG_MAPPING_NAMES)))
def test_what_has_no_model_of_its_own_says_so(model_type):
    with pytest.raises(NotBuiltError, match="part of"):
        build(model_type)


@pytest.mark.skipif(not NEW, reason="the tables are for the newest transformers")
def test_tables_name_known_types():
    known = set(model_types())
    for table in (OVERRIDES, COMPOSED, CLASSES, NOT_BUILT):
        # parts of a model have a type too, which no Auto class knows
        assert not {name for name in table if name not in known} - {"qwen3_omni_moe_talker"}


@pytest.mark.skipif("qwen3_next" not in CONFIG_MAPPING_NAMES, reason="a newer type")
def test_every_kind_of_layer_is_kept():
    config = build("qwen3_next").model.config
    assert set(config.layer_types) == {"linear_attention", "full_attention"}


def test_rules():
    assert small_size("hidden_size", 4096, hidden=32, heads=True) == 32
    assert small_size("hidden_size", 16, hidden=32, heads=True) is None  # smaller already
    assert small_size("num_attention_heads", 32, hidden=48, heads=False) is None
    assert small_size("hidden_dropout_prob", 1, hidden=32, heads=True) is None
    assert small_size("use_cache", True, hidden=32, heads=True) is None
    assert small_depth("num_hidden_layers", 32) == 2
    assert small_depth("hidden_size", 4096) is None
    assert small_token("eos_token_id", 2) is None
    assert 0 < small_token("eos_token_id", 128_001) < 160
    assert small_token("eos_token_id", [128_001, 128_009]) == [3 + 128_001 % 150, 3 + 128_009 % 150]


def test_weights_that_would_hide_a_block():
    model = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    model.scale = nn.Parameter(torch.full((8,), 1e-6))
    model.lost = nn.Parameter(torch.full((8,), float("nan")))
    model.decay = nn.Parameter(torch.arange(8.0))
    nn.init.zeros_(model[2].weight)
    randomise(model)
    assert model[2].weight.detach().std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert model.scale.detach().mean().item() == pytest.approx(0.5, abs=0.2)
    assert model.lost.isfinite().all()
    assert torch.equal(model.decay, torch.arange(8.0))


class Picky(nn.Module):
    """Takes what its signature asks for and nothing else; its name says nothing."""

    main_input_name = "pixel_values"

    def __init__(self, error=False):
        super().__init__()
        self.config = type("Config", (), {"image_size": 8, "num_channels": 3, "hidden_size": 4})()
        self.weight = nn.Parameter(torch.ones(1))
        self.error = error

    def forward(self, pixel_values, hidden_states):
        if self.error or pixel_values.dim() != 5:
            raise ValueError("pictures come as lists")
        return (pixel_values.mean() * self.weight + hidden_states.mean(),)


def test_inputs_by_trial():
    inputs = synthetic_inputs(Picky())
    assert inputs["pixel_values"].shape == (2, 1, 3, 8, 8)
    assert inputs["hidden_states"].shape[-1] == 4


def test_no_inputs_where_nothing_is_taken():
    assert synthetic_inputs(Picky(error=True)) is None
    assert next(candidate_inputs(Picky(error=True))) is not None


def test_inputs_leave_the_model_as_it_was():
    model = build("bert").model.train()
    state = torch.get_rng_state()
    inputs = synthetic_inputs(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, synthetic_inputs(model)[name]) for name, tensor in inputs.items())


def test_inputs_may_say_what_to_do_with_the_cache():
    """Models whose layers keep states (Mamba) run without a cache only, and their inputs say so."""
    model = build("gpt2").model
    result = hf_geglu.compare(model, model, {**inputs_for(model), "use_cache": False})
    assert result.max_abs == 0.0
