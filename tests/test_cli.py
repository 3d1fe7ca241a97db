"""The command line: what it prints, what it writes, and how it refuses."""

import json

import pytest
import transformers
from tiny_models import tiny
from typer.testing import CliRunner

import hf_geglu
from hf_geglu.cli import app as cli
from hf_geglu.plan import Plan

runner = CliRunner()


@pytest.fixture
def base(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _run(monkeypatch, capsys, *words):
    """Through `main`, as the console command does: (exit code, stdout, stderr)."""
    monkeypatch.setattr("sys.argv", ["hf-geglu", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return end.value.code, out, err


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_plan_reads_the_config_only(base, monkeypatch, capsys):
    (base / "model.safetensors").unlink()
    before = _files(base)
    code, out, _ = _run(monkeypatch, capsys, "plan", base)
    assert code == 0
    assert "2 FFN blocks to convert" in out
    assert "bert.encoder.layer.1.intermediate.dense: expand" in out
    code, out, _ = _run(monkeypatch, capsys, "plan", base, "--json", "--layers", "0")
    assert len(Plan.from_json(out).sites) == 1
    assert _files(base) == before


def test_convert_writes_a_variant_that_loads(base, tmp_path, monkeypatch, capsys):
    code, out, err = _run(monkeypatch, capsys, "convert", base, tmp_path / "out", "--dtype", "float32")
    assert code == 0, err
    assert "2 FFN blocks are geglu now, exact" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "geglu_bert"
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert hf_geglu.find_sites(model).sites[0].layout == "packed"
    code, _, err = _run(monkeypatch, capsys, "convert", base, tmp_path / "out")
    assert code == 2
    assert "not empty" in err
    code, _, _ = _run(monkeypatch, capsys, "convert", base, tmp_path / "out", "--overwrite")
    assert code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variant", "nope"], "unknown GLU variant 'nope'"),
        (["--layers", "77"], "matches none of the 2 FFN sites"),
        (["--variant", "reglu"], "leads to the gates"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(base, tmp_path, monkeypatch, capsys, words, message):
    code, _, err = _run(monkeypatch, capsys, "convert", base, tmp_path / "out", *words)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there(tmp_path, monkeypatch, capsys):
    code, _, err = _run(monkeypatch, capsys, "plan", tmp_path / "nowhere")
    assert code == 2
    assert "nowhere" in err


def test_help_lists_the_commands():
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in (
        "plan",
        "convert",
        "verify",
        "reproduce",
        "document",
        "push",
        "shrink",
        "restore",
        "finetune",
        "demo",
    ):
        assert command in result.stdout


def test_finetune_hands_its_flags_on(monkeypatch, capsys, tmp_path):
    words = ["--model-name-or-path", "x", "--output-dir", tmp_path / "o", "--train-file", "x.txt", "--max-stepz", "3"]
    code, _, err = _run(monkeypatch, capsys, "finetune", "clm", *words)
    assert code == 2
    assert "max_steps" in err


def test_convert_to_fewer_neurons(tmp_path, monkeypatch, capsys):
    from tiny_training import SENTENCES, VOCABULARY, causal_tokenizer

    tiny("gpt2", vocab_size=VOCABULARY).save_pretrained(tmp_path / "base")
    causal_tokenizer().save_pretrained(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 60), encoding="utf-8")
    words = ("convert", tmp_path / "base", tmp_path / "out", "--width", "0.6")
    code, _, err = _run(monkeypatch, capsys, *words)
    assert code == 2
    assert "--calibrate FILE" in err
    code, out, err = _run(monkeypatch, capsys, *words, "--calibrate", text, "--calibration-tokens", 2000)
    assert code == 0, err
    assert "24 neurons, closed, dense control: KL" in out
    plan = json.loads((tmp_path / "out" / "geglu" / "manifest.json").read_text())["provenance"]["plan"]
    assert plan["narrowing"]["result"]["stage"] == "closed"
    assert plan["config_changes"] == {"n_inner": 24}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.n_inner == 24
    code, _, err = _run(monkeypatch, capsys, *words[:2], tmp_path / "other", "--heal")
    assert code == 2
    assert "--width beside" in err


def test_of_several_texts_an_equal_share_is_taken(tmp_path):
    from tiny_training import SENTENCES, VOCABULARY, causal_tokenizer

    from hf_geglu.cli.calibrating import mixed_batches

    for number in range(2):
        text = "\n".join(SENTENCES[number : number + 1] * 1800)
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    texts = [str(tmp_path / f"{number}.txt") for number in range(2)]
    model, tokenizer = tiny("llama", vocab_size=VOCABULARY), causal_tokenizer()
    batches = mixed_batches(texts, model, tokenizer, tokens=8192)
    kinds = [frozenset(batch["input_ids"].flatten().tolist()) for batch in batches]
    assert sorted(kinds.count(kind) for kind in set(kinds)) == [4, 4]
    assert kinds != sorted(kinds, key=kinds.index)  # both among those that fit and, as a rule, those that choose


def test_convert_calibrated_on_a_text_file(tmp_path, monkeypatch, capsys):
    from tiny_training import SENTENCES, VOCABULARY, causal_tokenizer

    model = tiny("llama", vocab_size=VOCABULARY)
    for name, parameter in model.named_parameters():
        parameter.data *= 12.0 if "_proj" in name else 1.0  # so that activations bend
    model.save_pretrained(tmp_path / "base")
    causal_tokenizer().save_pretrained(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 60), encoding="utf-8")
    words = ("convert", tmp_path / "base", tmp_path / "out", "--calibrate", text, "--calibration-tokens", 2000)
    code, out, err = _run(monkeypatch, capsys, *words)
    assert code == 0, err
    assert "chosen on held-out data" in out
    manifest = json.loads((tmp_path / "out" / "geglu" / "manifest.json").read_text())
    assert manifest["provenance"]["plan"]["calibration"]["data"] == "text.txt"
    assert str(tmp_path) not in (tmp_path / "out" / "geglu" / "manifest.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.hidden_act == "gelu"
    by_layer = (*words[:2], tmp_path / "by-layer", *words[3:], "--memory", "layer")
    code, again, err = _run(monkeypatch, capsys, *by_layer)
    assert code == 0, err
    assert "chosen on held-out data" in again
    for name in ("model.safetensors", "config.json", "geglu/fits.safetensors"):
        assert (tmp_path / "by-layer" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    code, out, err = _run(monkeypatch, capsys, "reproduce", tmp_path / "by-layer", "--base", tmp_path / "base")
    assert code == 0, out + err
    code, _, err = _run(monkeypatch, capsys, *by_layer, "--overwrite", "--width", 0.5)
    assert code == 2
    assert "--memory layer with --width" in err
    code, _, err = _run(monkeypatch, capsys, "convert", tmp_path / "base", tmp_path / "other", "--max-kl", 0.1)
    assert code == 2
    assert "--calibrate" in err
    code, _, err = _run(monkeypatch, capsys, *words[:2], tmp_path / "other", *words[3:], "--max-kl", 1e-15)
    assert code == 2
    assert "max_kl=1e-15" in err
    assert not (tmp_path / "other").exists()
