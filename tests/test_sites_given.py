"""Sites named by hand are confirmed, or refused with what was observed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import tiny

from hf_geglu.errors import SiteError
from hf_geglu.sites import find_sites


@pytest.mark.parametrize("model_type", ["bert", "opt", "gpt2", "llama", "modernbert", "esm", "bart", "convnext", "mt5"])
def test_found_sites_can_be_given_back(model_type: str) -> None:
    model = tiny(model_type)
    found = find_sites(model)
    assert find_sites(model, sites=found.sites).sites == found.sites


def test_some_of_the_sites_can_be_given() -> None:
    model = tiny("bert")
    last = find_sites(model).sites[1]
    found = find_sites(model, sites=[last])
    assert (found.sites, found.rejected) == ((last,), ())


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("bert", {"activation": "relu"}, "activation='relu' (observed 'gelu')"),
        ("bert", {"activation": "gelu_pytorch_tanh"}, "(observed 'gelu')"),
        ("bert", {"width": 64}, "width=64 (observed 40)"),
        ("modernbert", {"gate_half": "last"}, "gate_half='last' (observed 'first')"),
        ("llama", {"layout": "packed"}, "layout='packed' (observed 'separate')"),
        ("bert", {"down": "bert.encoder.layer.0.nowhere"}, "down='bert.encoder.layer.0.nowhere' is no module"),
        ("bert", {"down": "bert.encoder.layer.1.output.dense"}, "holds no FFN block made of"),
        ("llama", {"gate": "model.layers.0.mlp.up_proj", "up": "model.layers.0.mlp.gate_proj"}, "gate="),
        ("opt", {"up": "model.decoder.layers.0.self_attn.q_proj"}, "Observed: dense relu from"),
    ],
)
def test_wrong_sites_are_refused(model_type: str, changes: dict[str, object], words: str) -> None:
    model = tiny(model_type)
    site = find_sites(model).sites[0]
    with pytest.raises(SiteError) as caught:
        find_sites(model, sites=[replace(site, **changes)])
    assert words in str(caught.value)
