"""Pretrained weights: MiniLM (dense GELU, exact) and SmolLM2-135M (SwiGLU, approximate), on real text."""

import pytest
import torch
from real_models import minilm, smollm2

import hf_geglu
from hf_geglu.demo.naive import naive_swap
from hf_geglu.demo.text import stdlib_corpus


@pytest.fixture(scope="module")
def text():
    return stdlib_corpus().held_out


def test_minilm_is_exact_in_float32(text):
    model, tokenizer = minilm()
    inputs = dict(tokenizer(list(text[:8]), padding=True, truncation=True, max_length=64, return_tensors="pt"))
    report = hf_geglu.convert(model, inputs=inputs)
    assert report.exact
    assert report.converted == 6
    assert report.tier == "portable"
    assert report.comparisons[0].dtype == "float32"
    assert report.comparisons[0].max_abs <= 1e-6


def test_smollm2_starts_where_the_original_is(text):
    model, tokenizer = smollm2()
    ids = tokenizer("\n\n".join(text[:12]), return_tensors="pt")["input_ids"][0, : 8 * 128].view(8, 128)
    inputs = {"input_ids": ids}
    plan = hf_geglu.make_plan(model)
    assert plan.tier == "native"
    assert plan.config_changes == {"hidden_act": "gelu"}
    naive = hf_geglu.compare(model, naive_swap(model, plan), inputs)
    (ours,) = hf_geglu.convert(model, plan, inputs=inputs).comparisons
    assert ours.kl <= 0.006
    assert ours.delta_nll <= 0.01
    assert naive.kl > 20 * ours.kl
    assert naive.delta_nll > 0.1


def test_find_sites_reads_no_weights_of_a_real_model():
    model, _ = smollm2()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    sums = torch.stack([parameter.sum() for parameter in model.parameters()])
    found = hf_geglu.find_sites(model)
    assert len(found) == 30
    assert {site.activation for site in found} == {"silu"}
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert torch.equal(torch.stack([parameter.sum() for parameter in model.parameters()]), sums)
