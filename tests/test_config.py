"""geglu_config: untrained models of any architecture with GeGLU blocks."""

import pytest
import torch
from tiny_models import TINY, F, tiny

import hf_geglu
from hf_geglu.errors import NoSitesError, PlanError, VariantError
from hf_geglu.width import matched_width


def _build(model_type, config):
    auto = TINY[model_type][0]
    torch.manual_seed(0)
    build = getattr(auto, "from_config", None)
    if build is None:
        return hf_geglu.modeling_geglu.__getattr__("Geglu" + auto.__name__)(config)
    return build(config)


@pytest.mark.parametrize(
    "model_type", ["bert", "gpt2", "opt", "vit", "whisper", "t5", "clip_vision_model", "llama", "phi3"]
)
@pytest.mark.parametrize("width", ["same", "matched", 24])
def test_untrained_models_have_geglu_blocks(model_type, width):
    dense = tiny(model_type)
    before = dense.config.to_dict()
    config = hf_geglu.geglu_config(dense.config, width)
    assert dense.config.to_dict() == before
    model = _build(model_type, config)
    sites = hf_geglu.find_sites(model).sites
    assert len(sites) == len(hf_geglu.find_sites(dense))
    assert {site.activation for site in sites} == {"gelu"}
    assert all(site.gated for site in sites)
    gated_before = hf_geglu.find_sites(dense).sites[0].gated
    expected = {"same": F, "matched": F if gated_before else matched_width(F), 24: 24}[width]
    assert {site.width for site in sites} == {expected}
    assert model.training is False or model.training is True
    up = model.get_submodule(sites[0].up)
    assert up.weight.std() > 0
    assert up.bias is None or not up.bias.any()


def test_t5_becomes_its_own_gated_form():
    config = hf_geglu.geglu_config(tiny("t5").config)
    assert type(config).__name__ == "T5Config"
    assert config.feed_forward_proj == "gated-gelu_python"
    assert hf_geglu.geglu_config(tiny("t5").config, variant="geglu_tanh").feed_forward_proj == "gated-gelu"


def test_untrained_variant_goes_to_disk_and_back(tmp_path):
    config = hf_geglu.geglu_config(tiny("bert").config, "matched")
    config.save_pretrained(tmp_path)
    from transformers import AutoConfig, AutoModelForMaskedLM

    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "GegluBertConfig"
    assert hf_geglu.find_sites(AutoModelForMaskedLM.from_config(loaded)).sites[0].width == matched_width(F)


@pytest.mark.parametrize(("width", "expected"), [(3072, 2048), (11008, 7360), (1536, 1024), (64, 42), (1, 1)])
def test_matched_width(width, expected):
    assert matched_width(width) == expected


def test_matched_width_keeps_the_parameters_within_two_percent():
    for width in range(64, 20000, 37):
        assert abs(3 * matched_width(width) - 2 * width) <= 0.02 * 2 * width


def test_bad_input():
    config = tiny("bert").config
    with pytest.raises(VariantError):
        hf_geglu.geglu_config(config, variant="x")
    with pytest.raises(PlanError, match="at least one"):
        hf_geglu.geglu_config(config, 0)
    with pytest.raises(PlanError, match="'same', 'matched'"):
        hf_geglu.geglu_config(config, "half")
    with pytest.raises(PlanError, match="variant's already"):
        hf_geglu.geglu_config(hf_geglu.geglu_config(config))
    with pytest.raises(PlanError, match="no entry"):
        hf_geglu.geglu_config(tiny("bloom").config, 24)
    with pytest.raises(NoSitesError):
        hf_geglu.geglu_config(tiny("mobilenet_v2").config)
