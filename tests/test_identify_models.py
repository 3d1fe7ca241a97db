"""Whole models, the finder's answers against asking, the config audit and the command line."""

import json

import pytest
import torch
from test_sites import EXPECTED, _skip_other_layouts
from tiny_models import tiny
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from typer.testing import CliRunner
from versions import BEFORE_5

from hf_geglu import identify
from hf_geglu.cli.app import app
from hf_geglu.errors import IdentifyError
from hf_geglu.identifying import Identity
from hf_geglu.identifying.audit import audit, canonical
from hf_geglu.identifying.loading import load_units, names_code
from hf_geglu.skeleton import architecture, skeleton


@pytest.mark.parametrize("model_type", ["bert", "opt", "gpt2", "llama", "t5", "clip", "modernbert", "mixtral", "esm"])
def test_models(model_type):
    """One answer a block, split and inline ones and experts included, and what the hand-written table says."""
    _skip_other_layouts(model_type)
    answers = identify(tiny(model_type))
    assert isinstance(answers, tuple)
    assert len(answers) > 0
    for answer in answers:
        assert answer.error < 1e-5 < answer.runner_up_error
    (count, _, layout, activation, half), first, _ = EXPECTED[model_type]
    assert len(answers) == count
    assert {(one.layout, one.activation, one.gate_half) for one in answers} == {(layout, activation, half)}
    if first is not None:
        assert answers[0].gate == f"{first[0]}.{first[1]}"


def _alone(model):
    """Blocks of a model that are modules by themselves."""
    for answer in identify(model):
        block = model.get_submodule(answer.path)
        if answer.path and sum(isinstance(one, nn.Linear) for one in block.modules()) <= 3:
            yield answer, identify(block)


@pytest.mark.parametrize("model_type", ["gemma", "llama", "phi3", "modernbert", "t5", "gpt_neox", "bloom", "vit"])
def test_finding_and_asking_agree(model_type):
    """The finder scores formulas, asking reads the function off: two ways to one answer."""
    pairs = list(_alone(tiny(model_type)))
    for found, asked in pairs:
        assert isinstance(asked, Identity)
        assert (asked.family, asked.activation, asked.layout, asked.gate_half) == (
            found.family,
            found.activation,
            found.layout,
            found.gate_half,
        )
        assert f"{found.path}.{asked.gate}" == found.gate
        assert (asked.gate_bias, asked.value_bias, asked.down_bias) == (
            found.gate_bias,
            found.value_bias,
            found.down_bias,
        )
    assert pairs or model_type == "vit"


def test_in_bfloat16():
    """Erf and tanh are told apart in a model that holds bfloat16."""
    (answer, *_) = identify(tiny("gemma").to(torch.bfloat16))
    assert (answer.family, answer.gelu) == ("geglu", "tanh")
    (answer, *_) = identify(tiny("modernbert").to(torch.bfloat16))
    assert (answer.family, answer.gelu) == ("geglu", "erf")


def test_several_blocks_are_a_tuple():
    model = tiny("llama")
    answers = identify(model.model.layers)
    assert [answer.path for answer in answers] == ["0.mlp", "1.mlp"]
    assert identify(model.model.layers[0]).family == "swiglu"


def _findings(model_type, **overrides):
    config = AutoConfig.for_model(model_type, **overrides)
    kind = architecture(config)
    return {(one.entry, one.setting): one for one in audit(config, lambda one: skeleton(one, kind))}


SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def test_audit_of_a_true_config():
    found = _findings("bert", **SMALL)["hidden_act", ""]
    assert (found.verdict, found.blocks, found.lies) == ("followed", 1, False)


@pytest.mark.skipif(BEFORE_5, reason="transformers 4 lets Gemma's config have its way")
def test_audit_of_coercion():
    found = _findings("gemma", **SMALL)["hidden_act", ""]
    assert (found.verdict, found.tried, found.then) == ("coerced", "gelu", ("gelu_pytorch_tanh",))


@pytest.mark.skipif("gpt_oss" not in CONFIG_MAPPING_NAMES, reason="a newer type")
def test_audit_of_an_ignored_entry():
    found = _findings("gpt_oss", num_hidden_layers=1)["hidden_act", ""]
    assert (found.verdict, found.stated, found.computed, found.lies) == ("ignored", "silu", ("quick_gelu",), True)


def test_audit_of_a_switch():
    found = _findings("dinov2", **SMALL)
    assert found["hidden_act", ""].verdict == "followed"
    assert found["hidden_act", "use_swiglu_ffn=True"].verdict == "ignored"


def test_audit_of_what_governs_something_else():
    found = _findings("modernbert", **SMALL)
    assert found["hidden_activation", ""].verdict == "followed"
    assert not found["classifier_activation", ""].lies


def test_audit_of_a_gated_form():
    found = _findings("t5", num_layers=1, feed_forward_proj="gated-gelu")["feed_forward_proj", ""]
    assert (found.verdict, found.computed) == ("contradicted", ("gelu_pytorch_tanh",))


def test_canonical_names():
    assert canonical("gelu_new") == canonical("gelu_fast") == "gelu_pytorch_tanh"
    assert canonical("swish") == "silu"
    assert canonical("gated-relu") == "relu"


RUN = CliRunner()


def test_command_on_a_model(tmp_path):
    tiny("modernbert").config.save_pretrained(tmp_path)
    done = RUN.invoke(app, ["identify", str(tmp_path), "--expect", "geglu"])
    assert done.exit_code == 0, done.output
    assert "geglu (erf): gelu(gate) * value; packed, gate first" in done.output
    assert "hidden_activation = 'gelu': followed by 2 blocks" in done.output
    assert RUN.invoke(app, ["identify", str(tmp_path), "--expect", "swiglu"]).exit_code == 1


@pytest.mark.skipif(BEFORE_5, reason="transformers 4 lets Gemma's config have its way")
def test_command_on_a_config_that_lies(tmp_path):
    tiny("gemma").config.save_pretrained(tmp_path)
    done = RUN.invoke(app, ["identify", str(tmp_path), "--json"])
    assert done.exit_code == 1
    told = json.loads(done.output)
    assert [one["gelu"] for one in told["units"]] == ["tanh", "tanh"]
    assert [one["verdict"] for one in told["config"] if one["lies"]] == ["coerced"]


UNITS = """
import torch
from torch import nn

class Unit(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.a, self.b = nn.Linear(dim, hidden), nn.Linear(dim, hidden)

    def forward(self, x):
        return torch.nn.functional.gelu(self.a(x)) * self.b(x)

def added(gate, value):
    return torch.tanh(gate) + value
"""


def test_command_on_code(tmp_path):
    file = tmp_path / "units.py"
    file.write_text(UNITS)
    done = RUN.invoke(app, ["identify", str(file)])
    assert done.exit_code == 0, done.output
    assert "geglu (erf): gelu(gate) * value; separate" in done.output
    done = RUN.invoke(app, ["identify", f"{file}:added", "--expect", "geglu"])
    assert done.exit_code == 1
    assert "added, not multiplied" in done.output
    done = RUN.invoke(app, ["identify", "torch.nn.functional:glu", "--json"])
    assert json.loads(done.output)["units"][0]["variant"] == "glu"


def test_code_is_run_only_where_it_is_named():
    assert names_code("file.py")
    assert names_code("folder/file.py:Unit")
    assert names_code("package.module:Unit")
    assert not names_code("google/gemma-2b")
    assert not names_code("gpt2")
    assert not names_code("folder/of-a.model")


def test_code_that_is_not_there(tmp_path):
    with pytest.raises(IdentifyError, match="there is no file"):
        load_units(str(tmp_path / "nothing.py"))
    file = tmp_path / "units.py"
    file.write_text(UNITS)
    with pytest.raises(IdentifyError, match="has no 'Nothing'; it has Unit"):
        load_units(f"{file}:Nothing")
    file.write_text("raise KeyError('broken')")
    with pytest.raises(IdentifyError, match="KeyError: 'broken'"):
        load_units(str(file))
    file.write_text("from torch import nn\nclass Picky(nn.Module):\n    def __init__(self, config): config.size")
    with pytest.raises(IdentifyError, match="Put an instance into the file"):
        load_units(f"{file}:Picky")
    file.write_text("x = 1")
    with pytest.raises(IdentifyError, match="name a function"):
        load_units(str(file))
    with pytest.raises(IdentifyError, match="cannot be imported"):
        load_units("no_such_package.module:Unit")
