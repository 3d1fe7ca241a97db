"""Golden outputs: small, honest about what was cut, and never in the way of a save."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny
from torch import nn

import hf_geglu
from hf_geglu.distance import outputs_of
from hf_geglu.errors import ManifestError
from hf_geglu.hub.golden import KEPT_LAST, check_golden, write_golden
from hf_geglu.hub.manifest import read_manifest
from hf_geglu.inputs import synthetic_inputs


def _about(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["golden"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def test_a_large_vocabulary_is_cut_and_the_cut_is_told(tmp_path):
    model = tiny("llama", vocab_size=5000)
    path = tmp_path / "golden.safetensors"
    assert write_golden(model, path) is None
    assert path.stat().st_size < 12_000
    about, tensors = _about(path)
    told = about["outputs"]["logits"]
    assert told["shape"] == [2, 16, 5000]
    assert told["kept"] == f"[2, 16, {KEPT_LAST}], evenly spaced in each dimension"
    with torch.no_grad():
        logits = outputs_of(model, {"input_ids": tensors["in.input_ids"]})["logits"]
    columns = torch.arange(KEPT_LAST) * 5000 // KEPT_LAST
    assert torch.equal(tensors["out.logits"], logits[..., columns])
    (check,) = check_golden(model, path)
    assert check.identical


def test_what_was_cut_away_still_counts_for_the_same_bits(tmp_path):
    model = tiny("llama", vocab_size=5000)
    write_golden(model, tmp_path / "g")
    with torch.no_grad():
        model.lm_head.weight[1].add_(1.0)  # a column between those that were kept
    (check,) = check_golden(model, tmp_path / "g")
    assert not check.identical
    assert check.max_abs == 0.0


def test_small_outputs_are_kept_whole(tmp_path):
    write_golden(tiny("bert"), tmp_path / "g")
    about, tensors = _about(tmp_path / "g")
    assert about["outputs"]["logits"]["kept"] == "all"
    assert list(tensors["out.logits"].shape) == about["outputs"]["logits"]["shape"]


def test_pictures_are_drawn_again_rather_than_stored(tmp_path):
    model = tiny("vit", image_size=64)
    write_golden(model, tmp_path / "g")
    about, tensors = _about(tmp_path / "g")
    assert not about["inputs"]["pixel_values"]["stored"]
    assert (tmp_path / "g").stat().st_size < 12_000
    assert not [name for name in tensors if name.startswith("in.")]
    assert all(check.identical for check in check_golden(model, tmp_path / "g"))
    about["inputs"]["pixel_values"]["sha256"] = "0" * 64
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "g", metadata={"golden": json.dumps(about)})
    with pytest.raises(ManifestError, match="cannot be made again"):
        check_golden(model, tmp_path / "g")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_told_from_another_network(tmp_path, dtype):
    """Another order of summation passes; SwiGLU in place of GeGLU does not."""
    model = tiny("llama", hidden_act="gelu", num_hidden_layers=4).to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:  # of the size that pretrained FFN blocks have
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                projection.weight.mul_(15.0)
    write_golden(model, tmp_path / "g")
    order = torch.randperm(model.config.intermediate_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in model.model.layers:
            for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                weight = getattr(layer.mlp, name).weight
                weight.copy_(weight.index_select(axis, order))
    (check,) = check_golden(model, tmp_path / "g")
    assert check.ok
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.SiLU()
    (check,) = check_golden(model, tmp_path / "g")
    assert not check.ok


def test_no_golden_outputs_is_a_reason_and_not_an_error(tmp_path):
    model = tiny("bert")
    assert "offloaded" in write_golden(model.to("meta"), tmp_path / "g")
    model = tiny("bert")
    hf_geglu.convert(model)
    forward = model.forward
    model.forward = lambda **_: 1 / 0
    assert synthetic_inputs(model) is None
    folder = hf_geglu.save_folder(model, tmp_path / "v")
    assert "can be run" in read_manifest(folder).golden
    model.forward = forward
    assert not (folder / "geglu" / "golden.safetensors").exists()
    from hf_geglu.hub.verifying import verify_variant

    checked = verify_variant(folder)
    assert checked.ok
    assert checked.checks[-1].outcome == "not checked"


def test_the_model_is_left_as_it_was(tmp_path):
    model = tiny("gpt2")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    write_golden(model, tmp_path / "g")
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
