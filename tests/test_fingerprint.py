"""Fingerprints: the same for the same weights however they are held, another for anything that matters."""

import copy

import pytest
import torch
import transformers
from tiny_models import TINY, tiny

import hf_geglu
from hf_geglu.errors import WeightsError
from hf_geglu.fingerprint import SAMPLES, Fingerprint, fingerprint


@pytest.fixture
def bert():
    return tiny("bert")


def _converted(model_type, **options):
    model = tiny(model_type)
    hf_geglu.convert(model, **options)
    return model


def test_same_weights_same_fingerprint(bert, tmp_path):
    first = fingerprint(bert)
    assert fingerprint(copy.deepcopy(bert)) == first
    bert.save_pretrained(tmp_path / "m", max_shard_size="8KB")
    assert fingerprint(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "m")) == first
    assert Fingerprint.from_dict(first.to_dict()) == first
    assert first.difference(first, bitwise=True) == ""


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_a_saved_variant_keeps_its_fingerprint_under_every_head(model_type, tmp_path):
    model = _converted(model_type)
    model.save_pretrained(tmp_path / "v")
    for auto in (TINY[model_type][0], transformers.AutoModel, transformers.AutoModelForSequenceClassification):
        other = auto.from_pretrained(tmp_path / "v")
        assert fingerprint(model).difference(fingerprint(other), bitwise=True) == ""


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_a_variant_is_not_its_base(model_type):
    base, variant = tiny(model_type), _converted(model_type)
    assert "unconverted" in fingerprint(variant).difference(fingerprint(base))
    partly = _converted(model_type, layers=0)
    assert "unconverted" in fingerprint(variant).difference(fingerprint(partly))
    hf_geglu.revert(variant)
    assert fingerprint(variant) == fingerprint(base)


def test_a_naive_swap_has_other_weights():
    variant = _converted("llama")
    naive = tiny("llama", hidden_act="gelu")
    assert "other weights" in fingerprint(variant).difference(fingerprint(naive))


def test_dtype_counts_only_bitwise(bert):
    half = copy.deepcopy(bert).to(torch.bfloat16)
    assert fingerprint(bert).difference(fingerprint(half)) == ""
    assert "dtype" in fingerprint(bert).difference(fingerprint(half), bitwise=True)
    assert "dtype" in fingerprint(half).difference(fingerprint(copy.deepcopy(half).float()), bitwise=True)


@pytest.mark.parametrize("name", ["embeddings.word_embeddings", "layer.1.attention.self.key", "layer.0.output.dense"])
def test_one_step_of_training_changes_it(bert, name):
    first = fingerprint(bert)
    weight = next(p for key, p in bert.named_parameters() if f"{name}.weight" in key)
    with torch.no_grad():
        weight.add_(1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    assert "other weights" in first.difference(fingerprint(bert))


def test_large_tensors_are_sampled_over_all_rows_and_columns():
    """Moving any single row or column of a matrix of usual shape by itself is seen."""
    shape = (192, 96)
    assert shape[0] * shape[1] > SAMPLES
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    first = fingerprint(linear)
    for axis, size in enumerate(shape):
        for index in range(size):
            changed = copy.deepcopy(linear)
            with torch.no_grad():
                changed.weight.select(axis, index).add_(1.0)
            assert fingerprint(changed) != first


def test_a_head_and_a_made_up_pooler_do_not_count(bert):
    first = fingerprint(bert)
    with torch.no_grad():
        bert.cls.predictions.transform.dense.weight.add_(1.0)
    assert fingerprint(bert) == first
    with_pooler = transformers.AutoModel.from_config(bert.config)
    with_pooler.load_state_dict(bert.bert.state_dict(), strict=False)
    assert fingerprint(with_pooler) == first


def test_adapters_are_looked_through():
    peft = pytest.importorskip("peft")
    model = _converted("llama")
    first = fingerprint(model)
    config = peft.LoraConfig(target_modules=["up_proj", "q_proj"], modules_to_save=["down_proj"])
    wrapped = peft.get_peft_model(model, config)
    assert fingerprint(wrapped) == first
    assert fingerprint(wrapped.get_base_model()) == first
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert fingerprint(wrapped) == first
    assert "other weights" in first.difference(fingerprint(wrapped.merge_and_unload()))


def test_weights_that_cannot_be_read_are_not_guessed(bert):
    whole = fingerprint(bert)
    with torch.device("meta"):
        empty = type(bert)(bert.config)
    found = fingerprint(empty)
    assert found.values is None
    assert found.structure == whole.structure
    assert whole.difference(found) == ""
    assert whole.difference(found, bitwise=True)


def test_what_is_no_fingerprint_is_refused():
    with pytest.raises(WeightsError, match="no fingerprint"):
        Fingerprint.from_dict({"sha": "x"})
