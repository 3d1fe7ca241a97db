"""The card says what was measured and nothing else, keeps what people wrote, and names no place on this machine."""

import json
import logging
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny_training import saved_model
from variants_on_disk import loaded_base, saved_base, saved_variant

import hf_geglu
from hf_geglu.hub import save_folder
from hf_geglu.hub.card import CARD, OURS_BESIDE, card, is_ours, metadata, pipeline_tag
from hf_geglu.hub.licence import BaseCard, Licence, base_card, licence_from
from hf_geglu.hub.manifest import MANIFEST, Manifest, read_manifest
from hf_geglu.hub.papers import amend
from hf_geglu.hub.privacy import find_secrets, find_traces
from hf_geglu.provenance import Base, LedgerRow, Provenance, TrainingRecord
from hf_geglu.training.run import finetune
from hf_geglu.training.settings.run import DataSettings, ModelSettings, OutputSettings, RunSettings, TrainSettings

LEDGER = (
    LedgerRow(name="original", nll=3.3361, perplexity=28.11),
    LedgerRow(name="step 0", nll=3.3305, perplexity=27.95, kl=0.00388),
    LedgerRow(name="step 12", nll=3.1566, perplexity=23.49, kl=0.09261),
    LedgerRow(name="control, step 12", nll=3.1586, perplexity=23.54),
)
RUN = TrainingRecord(
    task="clm",
    steps=12,
    tokens=6144,
    seed=42,
    data="org/corpus (small)",
    dataset_id="org/corpus",
    revision="f" * 40,
    data_fingerprint="e" * 64,
    settings={"learning_rate": 5e-5},
    ledger=LEDGER,
    held_out_tokens=4064,
    control=True,
)
INHERITED = BaseCard(licence=Licence(license="apache-2.0"), language="en")


def _manifest(tmp_path, model_type="llama", *trainings, base=None) -> Manifest:
    folder, _ = saved_variant(tmp_path, model_type)
    manifest = read_manifest(folder)
    provenance = replace(manifest.provenance, trainings=trainings, base=base or manifest.provenance.base)
    return replace(manifest, provenance=provenance)


HUB = Base(id="org/base", name="org/base", commit="a" * 40)


def test_metadata_of_a_trained_variant(tmp_path):
    manifest = _manifest(tmp_path, "llama", RUN, base=HUB)
    data = ModelCard(card(manifest, inherited=INHERITED, name="me/v")).data
    assert data.base_model == "org/base"
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.license == "apache-2.0"
    assert data.language == "en"
    assert data.datasets == ["org/corpus"]
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["hf_geglu", "geglu"]
    assert data.model_name == "me/v"
    results = {result.metric_type: result for result in data.eval_results}
    assert results["perplexity"].metric_value == 23.49
    assert results["nll"].metric_value == 3.1566
    assert results["perplexity"].dataset_type == "org/corpus"
    assert results["perplexity"].dataset_revision == "f" * 40


def test_metadata_claims_nothing_that_is_not_so(tmp_path):
    manifest = _manifest(tmp_path, "gpt2", base=HUB)
    data = metadata(manifest, inherited=BaseCard(), name="v").to_dict()
    assert "base_model_relation" not in data  # not trained: none of the Hub's relations is true
    assert "model-index" not in data
    assert "datasets" not in data
    assert data["license"] == "other"
    assert "custom_code" in data["tags"]
    delta = metadata(replace(manifest, kind="delta"), inherited=BaseCard(), name="v").to_dict()
    assert delta["base_model_relation"] == "adapter"
    assert "custom_code" not in delta["tags"]
    local = metadata(_manifest(tmp_path / "x", "gpt2", RUN), inherited=BaseCard(), name="v").to_dict()
    assert "base_model" not in local
    assert "base_model_relation" not in local


def test_a_run_that_measured_nothing_has_no_results(tmp_path):
    manifest = _manifest(tmp_path, "llama", replace(RUN, ledger=(), control=False), base=HUB)
    text = card(manifest, inherited=INHERITED, name="v")
    assert ModelCard(text).data.eval_results is None
    assert "nothing was measured" in text


def test_body_has_every_section(tmp_path):
    text = card(_manifest(tmp_path, "llama", RUN, base=HUB), inherited=INHERITED, name="me/v", curves=True)
    for expected in (
        "# me/v",
        "[org/base](https://huggingface.co/org/base) at `aaaaaaaaaaaa`",
        "2 feed-forward blocks converted to `geglu` (approximately",
        "then trained for 12 steps",
        "| 2 | gated silu | retarget -> geglu |",
        "at most 3.5e-02 a neuron",
        "`hidden_act = gelu`",
        "| original | 28.11 | 3.3361 | +0.0000 |  |",
        "| step 12 | 23.49 | 3.1566 | -0.1795 | 0.09261 |",
        "| control, step 12 | 23.54 | 3.1586 | -0.1775 |  |",
        "The control is the unconverted model",
        "![Held-out loss](geglu/loss.png)",
        "| whole model, logits | float32 |",
        "Value branches that receive gradient: 2 of 2.",
        "With plain transformers; no plugin and no remote code.",
        "vLLM's own Llama accepts only `silu`",
        "llama.cpp's Llama graph has SiLU built in",
        "seed 42",
        f"data revision `{'f' * 40}`",
        "hf-geglu verify me/v",
        "That of the base: apache-2.0.",
    ):
        assert expected in text, expected


def test_the_code_on_the_card_loads_the_variant(tmp_path, monkeypatch):
    for model_type in ("bert", "llama", "vit", "gpt2", "whisper", "t5"):
        folder, _ = saved_variant(tmp_path, model_type)
        monkeypatch.chdir(tmp_path)
        code = (folder / CARD).read_text().split("```python\n")[1].split("```")[0]
        names = {}
        exec(code.split("trust_remote_code")[0].rpartition("\n")[0] if "trust_remote" in code else code, names)
        assert type(names["model"]).__name__ == read_manifest(folder).model_class


def test_unknown_licence_is_other_with_a_warning(tmp_path, caplog):
    base = saved_base(tmp_path / "base", "gpt2", card=None)
    model = loaded_base(base, "gpt2")
    hf_geglu.convert(model)
    with caplog.at_level(logging.WARNING, logger="hf_geglu"):
        folder = save_folder(model, tmp_path / "v")
    assert "licence unknown (base has no card that says so)" in caplog.text
    text = (folder / CARD).read_text()
    assert ModelCard(text).data.license == "other"
    assert "**Unknown.**" in text


def test_a_local_base_says_what_it_was_made_from(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / CARD).write_text("---\nlicense: mit\nbase_model: org/first\n---\n")
    inherited = base_card(Base(name="base"), base)
    text = card(_manifest(tmp_path / "a", "llama", RUN), inherited=inherited, name="v")
    assert "(a local folder), made from org/first as its own card says, with its 2 feed-forward blocks" in text
    assert "org/first" not in card(_manifest(tmp_path / "b", "llama", RUN, base=HUB), inherited=inherited, name="v")


def test_licence_is_inherited_whole(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    head = "---\nlicense: other\nlicense_name: llama3.2\nlicense_link: LICENSE\n---\n"
    (base / CARD).write_text(head)
    found = base_card(Base(name="base"), base).licence
    assert found == Licence(license="other", license_name="llama3.2", license_link="LICENSE")
    assert found.known
    assert not licence_from({"license": "other"}).known
    assert not licence_from({"license": "unknown"}).known
    assert not licence_from({}).known
    assert licence_from({"license": ["mit"]}).license == "mit"


def test_licence_files_travel(tmp_path):
    base = saved_base(tmp_path / "base", "gpt2")
    (base / "LICENSE.txt").write_text("terms")
    (base / "NOTICE").write_text("notice")
    model = loaded_base(base, "gpt2")
    hf_geglu.convert(model)
    folder = save_folder(model, tmp_path / "v")
    assert (folder / "LICENSE.txt").read_text() == "terms"
    assert (folder / "NOTICE").read_text() == "notice"


# -- cards that people wrote -------------------------------------------------------------------------------------------


def _model(tmp_path):
    model = loaded_base(saved_base(tmp_path / "base", "bert"), "bert")
    hf_geglu.convert(model)
    return model


@pytest.mark.parametrize("kind", ["written", "edited"])
def test_a_persons_card_is_not_destroyed(tmp_path, kind):
    model = _model(tmp_path)
    folder = save_folder(model, tmp_path / "v")
    text = "# Mine\n" if kind == "written" else (folder / CARD).read_text().replace("# v", "# My own title")
    (folder / CARD).write_text(text)
    assert not is_ours(folder / CARD)
    save_folder(model, folder, overwrite=True)
    assert (folder / CARD).read_text() == text
    assert "hf-geglu verify v" in (folder / OURS_BESIDE).read_text()
    amend(folder, name="me/v")
    assert (folder / CARD).read_text() == text
    assert "hf-geglu verify me/v" in (folder / OURS_BESIDE).read_text()


def test_our_card_is_written_anew(tmp_path):
    model = _model(tmp_path)
    folder = save_folder(model, tmp_path / "v")
    save_folder(model, folder, overwrite=True)
    assert not (folder / OURS_BESIDE).exists()
    amend(folder, name="me/other-name", licence=Licence(license="mit"))
    text = (folder / CARD).read_text()
    assert is_ours(folder / CARD)
    assert "# me/other-name" in text
    assert "license: mit" in text


# -- traces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_no_path_host_or_secret_in_any_paper(tmp_path, model_type, monkeypatch):
    secret = "hf_" + "q" * 30
    base = saved_base(tmp_path / "base", model_type)
    model = loaded_base(base, model_type)
    hf_geglu.convert(model)
    command = ["/opt/venv/bin/hf-geglu", "convert", str(base), str(tmp_path / "v"), "--token", secret]
    record = replace(RUN, data=str(tmp_path / "text.txt"), dataset_id=None, settings={"note": f"{Path.home()}/x/y"})
    folder = save_folder(model, tmp_path / "v", training=record, command=command)
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".md", ".py"):
            text = path.read_text()
            for trace in (str(tmp_path), str(Path.home()) + "/", "/opt/venv", secret, socket.gethostname()):
                assert trace not in text, (path.name, trace)
            assert not list(find_traces(text)), path.name
            assert not list(find_secrets(text)), path.name
    assert read_manifest(folder).command == "hf-geglu convert base v --token REMOVED"


def test_manifest_goes_to_json_and_back(tmp_path):
    manifest = _manifest(tmp_path, "gpt2", RUN, base=HUB)
    again = Manifest.from_json(manifest.to_json())
    assert again.provenance.plan == manifest.provenance.plan
    assert again.provenance.trainings == manifest.provenance.trainings
    assert Manifest.from_json(again.to_json()) == again
    bare = Manifest(model_class="X", provenance=Provenance(base=Base()))
    assert Manifest.from_json(bare.to_json()) == bare


def test_pipeline_tags_follow_from_the_head():
    assert pipeline_tag("GegluGPT2LMHeadModel") == "text-generation"
    assert pipeline_tag("BertForMaskedLM") == "fill-mask"
    assert pipeline_tag("BertModel") is None


# -- a run's own papers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", [False, True])
def test_papers_of_a_training_run(tmp_path, control):
    base = saved_model(tmp_path / "base", "clm")
    (tmp_path / "text.txt").write_text("the value branch is open from the first step\n" * 200)
    settings = RunSettings(
        model=ModelSettings(model_name_or_path=str(base), convert=True, control=control),
        data=DataSettings(train_file=[str(tmp_path / "text.txt")], block_size=16, validation_split_percentage=10),
        train=TrainSettings(max_steps=2, per_device_train_batch_size=2, use_cpu=True, save_steps=0),
        output=OutputSettings(output_dir=str(tmp_path / "out")),
    )
    command = ["hf-geglu", "finetune", "clm", "--train_file", str(tmp_path / "text.txt")]
    result = finetune(settings, "clm", command=command)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.trained
    assert manifest.command == "hf-geglu finetune clm --train_file text.txt"
    (run,) = manifest.trainings
    assert (run.steps, run.seed, run.data, run.dataset_id) == (2, 42, "text.txt", None)
    assert len(run.data_fingerprint) == 64
    rows = {row.name: row.nll for row in run.ledger}
    expected = {"step 0": result.trained.evals[0].nll, "step 2": result.trained.evals[-1].nll}
    if control:
        expected |= {"original": result.control.evals[0].nll, "control, step 2": result.control.evals[-1].nll}
    assert rows == expected
    text = (tmp_path / "out" / CARD).read_text()
    assert is_ours(tmp_path / "out" / CARD)
    assert f"| step 2 | {result.trained.evals[-1].perplexity:.2f} |" in text
    assert ("The control is" in text) == control
    assert ModelCard(text).data.eval_results[0].metric_value == round(result.trained.evals[-1].perplexity, 6)
    assert str(tmp_path) not in text + (tmp_path / "out" / MANIFEST).read_text()
    from hf_geglu.hub.reproduce import reproduce_variant
    from hf_geglu.hub.verifying import verify_variant

    assert verify_variant(tmp_path / "out").ok
    assert reproduce_variant(tmp_path / "out", base=base).ok


def test_training_a_variant_further_keeps_its_history(tmp_path):
    base = saved_base(tmp_path / "base", "gpt2")
    model = loaded_base(base, "gpt2")
    hf_geglu.convert(model)
    first = save_folder(model, tmp_path / "one", training=RUN)
    again = loaded_base(first, "gpt2")
    second = save_folder(again, tmp_path / "two", training=replace(RUN, steps=30))
    assert [run.steps for run in read_manifest(second).trainings] == [12, 30]
    assert "then trained for 42 steps" in (second / CARD).read_text()


def test_curves_go_along(tmp_path):
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"\x89PNG")
    folder = save_folder(_model(tmp_path), tmp_path / "v", curves=picture)
    assert (folder / "geglu" / "loss.png").read_bytes() == b"\x89PNG"
    assert "![Held-out loss](geglu/loss.png)" in (folder / CARD).read_text()
    assert json.loads((folder / MANIFEST).read_text())["kind"] == "model"
