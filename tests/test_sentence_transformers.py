"""sentence-transformers: a variant keeps the layout of its folder, and gives the original's embeddings."""

import json
import subprocess
import sys

import numpy
import pytest
from real_models import minilm_files  # noqa: F401
from tiny_models import tiny

import hf_geglu
from hf_geglu.errors import OutputError
from hf_geglu.hub import save_folder
from hf_geglu.hub.companions import carry_companions

SENTENCES = ["A man is eating food.", "The girl is carrying a baby.", "Quantum mechanics is strange."]


def test_a_converted_folder_keeps_its_layout(minilm_files, tmp_path):  # noqa: F811
    from typer.testing import CliRunner

    from hf_geglu.cli.app import app

    result = CliRunner().invoke(app, ["convert", str(minilm_files), str(tmp_path / "v")])
    assert result.exit_code == 0, result.output
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "v" / name).read_bytes() == (minilm_files / name).read_bytes()
    package = pytest.importorskip("sentence_transformers")
    expected = package.SentenceTransformer(str(minilm_files), device="cpu").encode(SENTENCES)
    found = package.SentenceTransformer(str(tmp_path / "v"), device="cpu")
    assert type(found[0].auto_model).__name__ == "GegluBertModel"
    numpy.testing.assert_allclose(found.encode(SENTENCES), expected, rtol=0, atol=1e-6)
    code = (
        "import sys, numpy, sentence_transformers\n"
        "model = sentence_transformers.SentenceTransformer('v', device='cpu', trust_remote_code=True)\n"
        f"numpy.save('found.npy', model.encode({SENTENCES!r}))\n"
        "assert 'hf_geglu' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True, capture_output=True)
    numpy.testing.assert_allclose(numpy.load(tmp_path / "found.npy"), expected, rtol=0, atol=1e-6)


def test_converted_inside_sentence_transformers(minilm_files, tmp_path):  # noqa: F811
    """Its own `save` keeps the layout; what it saves is the variant."""
    package = pytest.importorskip("sentence_transformers")
    model = package.SentenceTransformer(str(minilm_files), device="cpu")
    expected = model.encode(SENTENCES)
    hf_geglu.convert(model[0].auto_model)
    numpy.testing.assert_allclose(model.encode(SENTENCES), expected, rtol=0, atol=1e-6)
    model.save(str(tmp_path / "v"))
    assert (tmp_path / "v" / "modeling_geglu.py").is_file()
    again = package.SentenceTransformer(str(tmp_path / "v"), device="cpu")
    assert type(again[0].auto_model).__name__ == "GegluBertModel"
    numpy.testing.assert_allclose(again.encode(SENTENCES), expected, rtol=0, atol=1e-6)


# -- companions of a folder --------------------------------------------------------------------------------------------


def _source(tmp_path, modules):
    source = tmp_path / "source"
    tiny("bert").save_pretrained(source)
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "config_sentence_transformers.json").write_text("{}")
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text("{}")
    (source / "unlisted").mkdir()
    (source / "unlisted" / "secret.json").write_text("{}")
    return source


def test_only_what_the_model_lists_goes_along(tmp_path):
    source = _source(tmp_path, [{"path": "", "type": "t"}, {"path": "2_Dense", "type": "d"}])
    model = tiny("bert")
    hf_geglu.convert(model)
    target = save_folder(model, tmp_path / "v", companions=source)
    assert (target / "2_Dense" / "config.json").is_file()
    assert not (target / "unlisted").exists()
    assert json.loads((target / "config.json").read_text())["model_type"] == "geglu_bert"  # not the source's
    assert carry_companions(source, target) == ()  # all of it is there


@pytest.mark.parametrize("path", ["../elsewhere", "/etc"])
def test_a_module_outside_the_folder_is_refused(tmp_path, path):
    source = _source(tmp_path, [{"path": path, "type": "t"}])
    model = tiny("bert")
    with pytest.raises(OutputError, match="outside of its folder"):
        save_folder(model, tmp_path / "v", companions=source)
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '[{"type": "x"}]'])
def test_damaged_modules(tmp_path, text):
    source = _source(tmp_path, [])
    (source / "modules.json").write_text(text)
    with pytest.raises(OutputError, match=r"modules\.json .* is damaged"):
        carry_companions(source, tmp_path)


def test_a_plain_model_has_none(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "source")
    assert carry_companions(tmp_path / "source", tmp_path) == ()
