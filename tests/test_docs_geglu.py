"""docs/geglu.md: every snippet runs and prints what it says, and every row about code is what `identify` finds."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as fn
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from versions import BEFORE_5

from hf_geglu import identify
from hf_geglu.skeleton import architecture, skeleton

PAGE = Path(__file__).parent.parent / "docs" / "geglu.md"


def test_snippets():
    result = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert result.attempted > 25
    assert result.failed == 0


class Glm130B(nn.Module):
    """The unit of SwissArmyTransformer's sat/model/official/glm130B_model.py: packed, value first, biases."""

    def __init__(self):
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(16, 84), nn.Linear(42, 16)

    def forward(self, x):
        value, gate = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(value * fn.gelu(gate))


def _transformers(made_from):
    model_type, *overrides = re.findall(r"`([^`]+)`", made_from)
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")
    keys = dict(part.split("=") for part in overrides)
    config = AutoConfig.for_model(model_type, **{key: value.strip('"') for key, value in keys.items()})
    return identify(skeleton(config, architecture(config)))


def _diffusers():
    pytest.importorskip("diffusers", reason="not installed")
    return (identify(importlib.import_module("diffusers.models.activations").GEGLU(16, 40)),)


def _x_transformers():
    pytest.importorskip("x_transformers", reason="not installed")
    return (identify(importlib.import_module("x_transformers.x_transformers").GLU(16, 40, nn.GELU())),)


OTHERS = {
    "GLM-130B": lambda: (identify(Glm130B()),),
    "diffusers": _diffusers,
    "x-transformers": _x_transformers,
}


def _rows():
    table = PAGE.read_text(encoding="utf-8").split("## Where it is used")[1].split("\n\n")
    lines = next(part for part in table if part.startswith("| model"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()[2:]]


def test_rows_are_there():
    assert len(_rows()) == 10
    assert {row[0] for row in _rows()} > set(OTHERS)


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0])
def test_row(row):
    name, made_from, form, layout, gate, value, bias = row
    answers = OTHERS[name]() if name in OTHERS else _transformers(made_from)
    assert answers
    for answer in answers:
        shown = f"{answer.layout}, gate {answer.gate_half}" if answer.gate_half else answer.layout
        assert (answer.family, answer.gelu, shown) == ("geglu", form, layout)
        assert (answer.gate.rpartition(".")[2], answer.value.rpartition(".")[2]) == (gate, value)
        assert answer.gate_bias is answer.value_bias is (bias == "yes")


def test_statements_about_configs():
    """The traps that the page tells of."""
    (gemma, *_) = _transformers('`gemma`, `hidden_act="gelu"`')
    assert gemma.gelu == ("erf" if BEFORE_5 else "tanh")  # transformers 5 changes the config as it reads it
    gpt_oss = AutoConfig.for_model("gpt_oss", num_hidden_layers=1) if _known("gpt_oss") else None
    if gpt_oss is not None:
        (unit,) = identify(skeleton(gpt_oss, architecture(gpt_oss)))
        assert gpt_oss.hidden_act == "silu"
        assert unit.formula == "quick_gelu(clamp(gate, -, 7)) * (clamp(value, -7, 7) + 1)"


def test_statement_about_diffusers():
    attention = pytest.importorskip("diffusers.models.attention", reason="not installed")
    assert identify(attention.FeedForward(16, activation_fn="geglu-approximate")).family == "dense"
    assert identify(attention.FeedForward(16, activation_fn="geglu")).gate_half == "last"


def _known(model_type):
    return model_type in CONFIG_MAPPING_NAMES


def test_bounds_of_the_page():
    """4.8e-4 between the forms, 0.021 to quick GELU, -0.17 at -0.75."""
    z = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    gelu = fn.gelu(z)
    assert float((gelu - fn.gelu(z, approximate="tanh")).abs().max()) < 4.8e-4
    assert 0.02 < float((gelu - z * torch.sigmoid(1.702 * z)).abs().max()) < 0.021
    assert float(gelu.min()) == pytest.approx(-0.17, abs=1e-4)
    assert float(z[gelu.argmin()]) == pytest.approx(-0.75, abs=2e-3)
