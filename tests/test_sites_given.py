"""Sites named by hand are confirmed, or refused with what was observed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny
from torch import nn

import hf_geglu
from hf_geglu.errors import SiteError
from hf_geglu.sites import find_sites, read_sites


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


@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("bert", {"up": "bert.encoder.layer.*.intermediate.dense", "down": "bert.encoder.layer.*.output.dense"}),
        ("opt", {"up": "model.decoder.layers.*.fc1", "down": "model.decoder.layers.*.fc2"}),
        (
            "gpt2",
            {"up": "transformer.h.*.mlp.c_fc", "down": "transformer.h.*.mlp.c_proj", "activation": "gelu_pytorch_tanh"},
        ),
        (
            "llama",
            {f"{role}": f"model.layers.*.mlp.{role}_proj" for role in ("gate", "up", "down")} | {"layout": "separate"},
        ),
    ],
)
def test_paths_are_enough(model_type: str, given: dict[str, object]) -> None:
    model = tiny(model_type)
    assert find_sites(model, sites=[given]).sites == find_sites(model).sites


class Narrow(nn.Module):
    """What the search takes for an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 6), nn.Linear(6, 12)

    def forward(self, x):
        return x + self.two(nn.functional.gelu(self.one(x)))


def test_by_hand_goes_where_the_search_does_not(tmp_path) -> None:
    model = nn.Sequential(Narrow(), Narrow()).double().eval()
    assert find_sites(model).sites == ()
    path = tmp_path / "sites.yaml"
    path.write_text("- up: '*.one'\n  down: '*.two'\n")
    x = torch.randn(3, 12, dtype=torch.float64)
    before = model(x)
    report = hf_geglu.convert(model, sites=read_sites(path), inputs={"input": x})
    assert report.converted == 2
    assert torch.allclose(model(x), before, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"up": "bert.encoder.layer.*.nothing", "down": "x"}, "matches nothing"),
        ({"up": "bert.encoder.layer.*.intermediate.dense"}, "names no down projection"),
        ({"upp": "a", "down": "b"}, "did you mean 'up'"),
        (
            {
                "up": "bert.encoder.layer.*.intermediate.dense",
                "down": "bert.encoder.layer.*.output.dense",
                "activation": "relu",
            },
            "activation='relu' (observed 'gelu')",
        ),
    ],
)
def test_wrong_hints_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(SiteError) as caught:
        find_sites(tiny("bert"), sites=[given])
    assert words in str(caught.value)


def test_a_file_that_is_no_list_is_refused(tmp_path) -> None:
    path = tmp_path / "sites.yaml"
    path.write_text("up: a\n")
    with pytest.raises(SiteError, match=r"sites\.yaml holds dict; expected a list"):
        read_sites(path)
