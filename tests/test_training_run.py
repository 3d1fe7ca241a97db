"""From settings to a saved model, and no trace of a run that could not start."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import (  # noqa: F401
    bert,
    causal_tokenizer,
    gpt2,
    interrupted,
    lines,
    llama,
    one_thread,
    same_weights,
    saved_model,
    snapshot,
)

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hf_geglu.errors import (
    ConfigurationError,
    DataError,
    HfGegluError,
    OutputError,
    SelectionError,
    TrainingError,
    VariantError,
)
from hf_geglu.training import DataSettings, ModelSettings, OutputSettings, RunSettings, TrainSettings
from hf_geglu.training.opening import choose_block_size
from hf_geglu.training.reports.log import to_json
from hf_geglu.training.run import finetune

# datasets 4 leaves csv files to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file.*[ct]sv:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*[ct]sv:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def place(place: Path) -> Path:
    """A folder with two models and a text, which is also the current one."""
    saved_model(place / "gpt2", "clm")
    saved_model(place / "bert", "mlm")
    (place / "text.txt").write_text("".join(line + "\n" for line in lines(80)))
    return place


MODEL = {"model_name_or_path", "convert", "control", "variant", "layers", "tokenizer_name"}
OUTPUT = set(OutputSettings.__dataclass_fields__)
TRAIN = set(TrainSettings.__dataclass_fields__)


def settings(**changed: Any) -> RunSettings:
    """Settings of a short run; each argument goes to the group that knows it."""
    given = {
        **{"model_name_or_path": "gpt2", "train_file": ["text.txt"], "output_dir": "out", "block_size": 16},
        **{"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True},
        **changed,
    }

    def group(kind: Any, names: set[str]) -> Any:
        return kind(**{name: value for name, value in given.items() if name in names})

    data = set(given) - MODEL - OUTPUT - TRAIN
    return RunSettings(
        model=group(ModelSettings, MODEL),
        data=group(DataSettings, data),
        train=group(TrainSettings, TRAIN),
        output=group(OutputSettings, OUTPUT),
    )


def log(folder: Path | str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "train_log.jsonl").read_text().splitlines()]


def test_a_causal_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = finetune(settings(eval_steps=2), "clm")
    assert {path.name for path in Path("out").iterdir()} >= {
        *("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("train_log.jsonl", "eval_log.jsonl", "settings.json", "results.json", "checkpoint-3"),
    }
    assert not [path.name for path in Path("out").iterdir() if path.name.startswith(".")]
    entries = log()
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert tuple(entry["loss"] for entry in entries) == result.trained.losses
    assert entries[0].keys() >= {"learning_rate", "grad_norm", "tokens", "predicted", "seconds", "tokens_per_second"}
    evals = [json.loads(line) for line in Path("out/eval_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in evals] == [0, 2, 3]
    assert evals[0]["perplexity"] == pytest.approx(math.exp(evals[0]["nll"]))
    results = json.loads(Path("out/results.json").read_text())
    assert results["trained"]["losses"] == list(result.trained.losses)
    assert results["control"] is None
    told = capsys.readouterr().err
    assert "training: 76 lines of running text" in told
    assert "step 3/3  loss" in told
    assert "tokens/s" in told
    assert "left" in told

    model = AutoModelForCausalLM.from_pretrained("out")
    assert same_weights(model, AutoModelForCausalLM.from_pretrained("out/checkpoint-3"))
    assert not same_weights(model, gpt2())
    assert AutoTokenizer.from_pretrained("out")("the fox")["input_ids"]


def test_a_masked_run() -> None:
    result = finetune(settings(model_name_or_path="bert", num_train_epochs=1.0, max_steps=-1), "mlm")
    assert len(result.trained.steps) == result.total_steps > 3
    assert same_weights(AutoModelForMaskedLM.from_pretrained("out"), AutoModelForMaskedLM.from_pretrained(newest()))


def newest() -> str:
    return str(max(Path("out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))


def test_a_stream_is_trained_on() -> None:
    result = finetune(settings(streaming=True, max_eval_samples=10), "clm")
    assert len(result.trained.losses) == 3


def double_first(model: Any) -> str:
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    return "doubled"


def test_a_control_beside_a_conversion(capsys: pytest.CaptureFixture[str]) -> None:
    result = finetune(settings(convert=True, control=True), "clm", convert_fn=double_first)
    assert result.control is not None
    plain = finetune(settings(output_dir="plain"), "clm")
    assert result.control.losses == plain.trained.losses
    assert result.trained.losses != plain.trained.losses
    assert [r.predicted for r in result.trained.steps] == [r.predicted for r in result.control.steps]
    assert tuple(entry["loss"] for entry in log("out/control")) == result.control.losses
    results = json.loads(Path("out/results.json").read_text())
    assert results["control"]["losses"] == list(result.control.losses)
    assert results["conversion"] == "doubled"
    rows = result.table().splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["converted", "control"]
    assert len({len(row) for row in rows}) == 1
    assert f"{result.control.evals[-1].nll:.4f}" in rows[2]
    assert "doubled" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "task"), [("gpt2", "clm"), ("bert", "mlm")])
def test_a_real_conversion_trains_resumes_and_loads(name: str, task: Any) -> None:
    how = {"model_name_or_path": name, "convert": True, "max_steps": 4, "save_steps": 2}
    whole = finetune(settings(**how, control=True), task)
    assert whole.control is not None
    # GELU models convert exactly, so both begin at the same loss; then the value branch learns.
    assert whole.trained.losses[0] == pytest.approx(whole.control.losses[0], abs=1e-4)
    assert whole.trained.losses[-1] != whole.control.losses[-1]
    assert json.loads(Path("out/results.json").read_text())["conversion"]["exact"] is True

    interrupted(lambda: finetune(settings(**how, output_dir="again"), task), after=3)
    resumed = finetune(settings(**how, output_dir="again", resume="latest"), task)
    assert resumed.trained.losses == whole.trained.losses
    kind = AutoModelForCausalLM if task == "clm" else AutoModelForMaskedLM
    first, second = kind.from_pretrained("out"), kind.from_pretrained("again")
    assert same_weights(first, second)
    assert first.config.model_type.startswith("geglu")
    assert same_weights(first, kind.from_pretrained("out/checkpoint-4"))

    with pytest.raises(TrainingError, match="does not fit the model"):
        finetune(settings(**{**how, "convert": False}, output_dir="again", resume="checkpoint-2"), task)


def test_a_resumed_run_leaves_what_an_uninterrupted_one_leaves() -> None:
    how = {"max_steps": 5, "save_steps": 2, "eval_steps": 1}
    whole = finetune(settings(**how, output_dir="whole"), "clm")
    interrupted(lambda: finetune(settings(**how), "clm"), after=3)
    assert not Path("out/config.json").exists()
    with (Path("out") / "train_log.jsonl").open("a") as file:
        file.write('{"step": 4, "los')  # the machine went down
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = finetune(settings(**how, resume="latest"), "clm")
    assert resumed.trained.losses == whole.trained.losses
    assert resumed.trained.evals == whole.trained.evals
    assert [(e["step"], e["loss"]) for e in log("out")] == [(e["step"], e["loss"]) for e in log("whole")]
    assert Path("out/eval_log.jsonl").read_text() == Path("whole/eval_log.jsonl").read_text()
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_a_control_resumes_too() -> None:
    how = {"convert": True, "control": True, "max_steps": 4, "save_steps": 2}
    whole = finetune(settings(**how, output_dir="whole"), "clm", convert_fn=double_first)
    from hf_geglu.training import run as module

    real, calls = module.train, []

    def stop_in_control(*args: Any, **named: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", stop_in_control)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings(**how), "clm", convert_fn=double_first)
    resumed = finetune(settings(**how, resume="latest"), "clm", convert_fn=double_first)
    assert resumed.control is not None
    assert whole.control is not None
    assert resumed.trained.losses == whole.trained.losses
    assert resumed.control.losses == whole.control.losses


def test_overwriting_replaces_the_earlier_run_and_nothing_else(place: Path) -> None:
    finetune(settings(max_steps=5, save_steps=1), "clm")
    Path("out/notes.md").write_text("mine")
    Path("out/model-00001-of-00002.safetensors").write_text("a stale shard")
    with pytest.raises(OutputError, match=r"out is not empty.*--resume.*--overwrite_output_dir"):
        finetune(settings(), "clm")
    finetune(settings(max_steps=2, overwrite_output_dir=True), "clm")
    assert [entry["step"] for entry in log()] == [1, 2]
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert Path("out/notes.md").read_text() == "mine"
    assert [path.name for path in Path("out").glob("*.safetensors")] == ["model.safetensors"]


def refuse(*_: Any) -> None:
    raise SelectionError("layers=9 matches nothing")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"train_file": ["absent.txt"]}, DataError, "absent.txt does not exist"),
        ({"train_file": ["numbers.csv"]}, DataError, r"a \(int64\), b \(float64\)"),
        ({"text_column": "body"}, DataError, r"text \(string\)"),
        ({"train_file": ["small.txt"]}, DataError, "expected at least 16, one block"),
        ({"streaming": True, "train_file": ["small.txt"], "validation_split_percentage": 0}, DataError, "stream"),
        ({"output_dir": "full"}, OutputError, "full is not empty"),
        ({"output_dir": "text.txt"}, OutputError, "text.txt is a file"),
        ({"output_dir": "gpt2", "overwrite_output_dir": True}, OutputError, "gpt2 holds gpt2, which this run reads"),
        ({"output_dir": ".", "overwrite_output_dir": True}, OutputError, "which this run reads"),
        ({"resume": "latest"}, TrainingError, "out holds no checkpoint"),
        ({"output_dir": "full", "resume": "latest"}, TrainingError, "full holds no checkpoint"),
        ({"output_dir": "full", "resume": "checkpoint-3"}, TrainingError, "checkpoint-3 does not exist"),
        ({"output_dir": "full", "resume": "gpt2"}, TrainingError, "holds no progress.json"),
        ({"model_name_or_path": "absent"}, ConfigurationError, "absent cannot be loaded"),
        ({"model_name_or_path": "full"}, ConfigurationError, "full cannot be loaded"),
        ({"tokenizer_name": "full"}, ConfigurationError, "full cannot be loaded.*--tokenizer_name"),
        ({"block_size": 65}, ConfigurationError, "expected at most 64, the positions"),
        ({"warmup_steps": 4}, ConfigurationError, "warmup_steps=4 in a run of 3 steps"),
        ({"warmup_steps": 9999, "max_steps": -1}, ConfigurationError, "warmup_steps=9999"),
        ({"lr_scheduler_kwargs": '{"slope": 1}', "lr_scheduler_type": "cosine"}, ConfigurationError, "slope"),
        ({"fp16": True}, ConfigurationError, "expected a GPU"),
        ({"tokenizer_name": "large"}, DataError, "the tokenizer gives token 5000, the model has embeddings for 96"),
        ({"convert": True}, SelectionError, "layers=9"),
        ({"model_name_or_path": "bert", "tokenizer_name": "gpt2"}, ConfigurationError, "sees the tokens that it is to"),
        ({"load_best_model_at_end": True, "validation_split_percentage": 0}, ConfigurationError, "without held-out"),
        (
            {"early_stopping_patience": 2, "eval_steps": 1, "validation_split_percentage": 0},
            ConfigurationError,
            "--early_stopping_patience without held-out data",
        ),
        ({"sample_prompts": ["the fox"]}, ConfigurationError, "64 takes all 64 positions"),
    ],
)
def test_a_run_that_cannot_start_leaves_no_trace(
    place: Path, changed: Any, error: type[HfGegluError], message: str
) -> None:
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").write_text("years of work")
    (place / "small.txt").write_text("the fox\nthe dog\n")
    (place / "numbers.csv").write_text("a,b\n1,2.5\n3,4.5\n")
    large = causal_tokenizer()
    large.save_pretrained("large")
    content = json.loads((place / "large" / "tokenizer.json").read_text())
    content["model"]["vocab"]["the"] = 5000
    (place / "large" / "tokenizer.json").write_text(json.dumps(content))
    before = snapshot(place)
    with pytest.raises(error, match=message):
        finetune(settings(**changed), "clm", convert_fn=refuse)
    assert snapshot(place) == before


def test_a_masked_model_for_a_causal_task_and_the_other_way(place: Path) -> None:
    before = snapshot(place)
    with pytest.raises(ConfigurationError, match="no mask token"):
        finetune(settings(), "mlm")
    with pytest.raises(ConfigurationError, match=r"cannot be loaded.*a masked language model"):
        finetune(settings(tokenizer_name="bert"), "mlm")
    assert snapshot(place) == before


def test_an_unknown_variant_is_refused_by_the_conversion(place: Path) -> None:
    before = snapshot(place)
    with pytest.raises(VariantError, match="nonsense"):
        finetune(settings(convert=True, variant="nonsense"), "clm")
    with pytest.raises(SelectionError, match="7"):
        finetune(settings(convert=True, layers="7"), "clm")
    assert snapshot(place) == before


def test_a_diverging_run_says_what_is_kept(place: Path) -> None:
    def explode(model: Any) -> str:
        model.transformer.h[1].mlp.c_fc.weight.register_hook(lambda gradient: gradient * math.nan)
        return "sabotaged"

    with pytest.raises(TrainingError, match=r"gradient norm became nan at step 1.*no checkpoint"):
        finetune(settings(convert=True), "clm", convert_fn=explode)
    assert not (place / "out" / "config.json").exists()


def test_block_sizes() -> None:
    tokenizer = causal_tokenizer()
    assert choose_block_size(None, gpt2().config, tokenizer) == 64
    assert choose_block_size(32, gpt2().config, tokenizer) == 32
    config = llama().config
    config.max_position_embeddings = 4096
    tokenizer.model_max_length = int(1e30)
    assert choose_block_size(None, config, tokenizer) == 1024
    config.max_position_embeddings = -1
    assert choose_block_size(2048, config, tokenizer) == 2048


def test_json_is_strict_and_keeps_no_absolute_paths() -> None:
    value = {"a": math.nan, "b": [math.inf, "/home/somebody/data.txt"], "c": ("x/y", None)}
    assert json.loads(to_json(value)) == {"a": None, "b": [None, "data.txt"], "c": ["x/y", None]}


def test_absolute_paths_do_not_reach_the_output(place: Path) -> None:
    finetune(settings(train_file=[str(place / "text.txt")], model_name_or_path=str(place / "gpt2")), "clm")
    for path in Path("out").rglob("*.json*"):
        assert str(place) not in path.read_text(), path


def test_curves_stand_beside_the_logs_and_on_the_card(place: Path) -> None:
    finetune(settings(convert=True, control=True, eval_steps=1), "clm")
    picture = (place / "out" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert (place / "out" / "geglu" / "loss.png").read_bytes() == picture  # with the control's curve
    assert "![Held-out loss](geglu/loss.png)" in (place / "out" / "README.md").read_text(encoding="utf-8")
    assert not list((place / "out").glob(".draft*"))


def test_curves_go_on_after_a_resume(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_geglu.training.reports import curves

    drawn: list[dict[str, list[tuple[int, float]]]] = []
    draw = curves.loss_curves
    monkeypatch.setattr(
        curves, "loss_curves", lambda path, found, **more: drawn.append(dict(found)) or draw(path, found, **more)
    )
    finetune(settings(eval_steps=1, save_steps=1, max_steps=2, lr_scheduler_type="constant"), "clm")
    finetune(settings(eval_steps=1, save_steps=1, max_steps=4, lr_scheduler_type="constant", resume="latest"), "clm")
    assert [step for step, _ in drawn[-1]["model"]] == [0, 1, 2, 3, 4]


def test_trackers_of_accelerate_are_told_of_both_runs(place: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = finetune(settings(convert=True, control=True, eval_steps=2, report_to=["tensorboard"]), "clm")
    for folder, run in ((place / "out", result.trained), (place / "out" / "control", result.control)):
        assert run is not None
        events = EventAccumulator(str(folder / "hf_geglu"))
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
        assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(run.losses, rel=1e-6)
        assert [event.step for event in events.Scalars("eval/nll")] == [record.step for record in run.evals]


@pytest.mark.parametrize(
    ("name", "message"),
    [("dagshub", "expected one or several of all, "), ("comet_ml", "comet_ml is not installed")],
)
def test_a_tracker_that_is_not_there_is_missed(place: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        finetune(settings(report_to=[name]), "clm")
    assert not (place / "out").exists()


def test_a_plan_says_what_a_run_takes_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hf_geglu.training.command_line import main

    before = snapshot(place)
    words = "--model_name_or_path gpt2 --train_file text.txt --output_dir out --block_size 16 --max_steps 7 --convert"
    assert main("clm", [*words.split(), "--use_cpu", "--per-device-train-batch-size", "2", "--plan"]) == 0
    assert snapshot(place) == before
    out = capsys.readouterr().out
    assert "7 of 32 tokens: 224 tokens" in out
    assert "GiB at the peak" in out
    assert main("clm", [*words.split(), "--use_cpu", "--plan", "--max_memory", "much"]) == 2
    assert "--max_memory much: expected a size such as 8GB" in capsys.readouterr().err
    assert main("clm", [*words.split(), "--use_cpu", "--plan", "--max_memory", "1MB"]) == 0
    assert "do not fit into 0.00" in capsys.readouterr().out
