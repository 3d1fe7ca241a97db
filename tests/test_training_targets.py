"""Numbers and several labels instead of a class: losses as transformers computes them, metrics, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tasks import sentence, write_task
from tiny_training import one_thread, snapshot  # noqa: F401

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from transformers import AutoModelForSequenceClassification

from hf_geglu.errors import ConfigurationError, DataError, HfGegluError
from hf_geglu.training import RunResult, evaluate
from hf_geglu.training.command_line import main, parse
from hf_geglu.training.objectives.metrics import LabelMetric, NumberMetric
from hf_geglu.training.outset import set_out
from hf_geglu.training.reports.records import numbers
from hf_geglu.training.run import finetune

TASK = "text_classification"
RUN = "--max_steps 4 --save_steps 2 --eval_steps 2 --per_device_train_batch_size 3 --learning_rate 1e-2 --use_cpu"

pytestmark = pytest.mark.usefixtures("place")


def write(task: str, values: list[Any], name: str = "label") -> None:
    rows = [{"text": sentence(i), name: value} for i, value in enumerate(values)]
    Path(f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(place: Path, values: list[Any], *more: str, task: Any = TASK, out: str = "out") -> RunResult:
    flags = write_task(place, task) if not (place / f"{task}-model").exists() else FLAGS[task]
    FLAGS[task] = flags
    if values:
        write(task, values)
    return finetune(parse([*flags, *RUN.split(), "--output_dir", out, *more], task), task)


FLAGS: dict[str, list[str]] = {}
NUMBERS = [0.5 * (i % 9) for i in range(40)]
LISTS = [[name for k, name in enumerate(("animals", "blocks", "values")) if (i >> k) % 2] for i in range(40)]


def test_fractions_are_a_regression(place: Path) -> None:
    found = run(place, NUMBERS, "--convert")
    last = found.trained.evals[-1]
    assert last.metrics["mse"] == pytest.approx(last.nll)
    assert -1 <= last.metrics["pearson"] <= 1
    assert last.nll < found.trained.evals[0].nll
    model = AutoModelForSequenceClassification.from_pretrained("out")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert any("regression: the loss is the squared error of label" in line for line in found.data)
    header, row = found.table().splitlines()
    assert "mse at the end" in header
    assert "perplexity" not in header
    assert f"{last.metrics['pearson']:.4f}" in row
    card = (place / "out" / "README.md").read_text(encoding="utf-8")
    assert "| model | mse | vs before" in card or "| model | mse | vs step 0" in card


def test_only_tokens_have_a_perplexity(place: Path) -> None:
    found = run(place, [], "--convert")
    last = found.trained.evals[-1]
    assert (last.perplexity, last.loss_name) == (None, "cross_entropy")
    header, row = found.table().splitlines()
    assert "cross_entropy at the end" in header
    assert "perplexity" not in header
    assert f"{last.nll:.4f}" in row
    told = [json.loads(line) for line in (place / "out" / "eval_log.jsonl").read_text().splitlines()]
    assert {(each["perplexity"], each["loss_name"]) for each in told} == {(None, "cross_entropy")}
    assert "perplexity" not in numbers(last)
    assert "| model | cross entropy | vs step 0 |" in (place / "out" / "README.md").read_text(encoding="utf-8")


def test_lists_are_several_labels(place: Path) -> None:
    found = run(place, LISTS)
    assert found.trained.evals[-1].metrics.keys() == {"f1_micro", "f1_macro", "accuracy"}
    model = AutoModelForSequenceClassification.from_pretrained("out")
    assert model.config.problem_type == "multi_label_classification"
    assert list(model.config.label2id) == ["animals", "blocks", "values"]
    hot = [[float(name in row) for name in ("animals", "blocks", "values")] for row in LISTS]
    again = run(place, hot, "--label_names", "animals", "blocks", "values", out="hot")
    assert again.trained.losses == found.trained.losses
    assert again.trained.evals == found.trained.evals


@pytest.mark.parametrize(
    ("values", "kind"), [(NUMBERS, "regression"), (LISTS, "multi_label_classification"), ([0, 1] * 20, None)]
)
def test_the_loss_is_that_of_transformers(place: Path, values: list[Any], kind: str | None) -> None:
    flags = write_task(place, TASK)
    write(TASK, values)
    outset, model = set_out(parse([*flags, *RUN.split(), "--output_dir", "out"], TASK), TASK)
    examples = [outset.corpus.train[i] for i in range(6)]  # type: ignore[index]
    batch = outset.objective.batch(examples, positions=range(6), seed=0)
    assert model.config.problem_type == (kind or "single_label_classification")
    with torch.no_grad():
        theirs = model.eval()(**batch).loss
    assert evaluate(model, examples, objective=outset.objective, batch_size=4).nll == pytest.approx(
        float(theirs), rel=1e-5
    )


def test_accumulation_is_weighted_by_what_is_predicted(place: Path) -> None:
    for number, values in enumerate((NUMBERS, LISTS)):
        one = run(place, values, "--per_device_train_batch_size", "8", out=f"one{number}")
        how = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"]
        eight = run(place, values, *how, out=f"eight{number}")
        assert eight.trained.losses == pytest.approx(one.trained.losses, rel=2e-5)


def test_metrics_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    said, given = (torch.randn(40, generator=generator) + 100 for _ in range(2))
    given[7] = torch.nan  # predicts nothing
    metric = NumberMetric()
    found = metric.values(metric.counts(said[:9, None], given[:9]) + metric.counts(said[9:, None], given[9:]))
    kept = ~given.isnan()
    x, y = said[kept].double().numpy(), given[kept].double().numpy()
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert found["mse"] == pytest.approx(((x - y) ** 2).mean())
    assert metric.values(metric.counts(torch.zeros(3, 1), torch.arange(3.0)))["pearson"] == 0.0

    logits, labels = torch.randn(30, 4, generator=generator), (torch.randn(30, 4, generator=generator) > 1).float()
    labels[:, 3], logits[:, 3] = 0.0, -1.0  # occurs nowhere
    several = LabelMetric(4)
    told = several.values(several.counts(logits[:11], labels[:11]) + several.counts(logits[11:], labels[11:]))
    guess, truth = logits > 0, labels > 0
    right = (guess & truth).sum(0)
    both = guess.sum(0) + truth.sum(0)
    assert told["f1_micro"] == pytest.approx(float(2 * right.sum() / both.sum()))
    assert told["f1_macro"] == pytest.approx(float((2 * right[:3] / both[:3]).mean()))
    assert told["accuracy"] == pytest.approx(float((guess == truth).all(1).float().mean()))


@pytest.mark.parametrize(
    ("values", "flags", "error", "message"),
    [
        ([0.5, None], [], DataError, "label None: expected a finite number"),
        ([0.5, math.nan], [], DataError, "label nan: expected a finite number"),
        (["a", "b"], ["--problem_type", "regression"], DataError, "label 'a': expected a finite number"),
        ([[0, 1], [3]], [], DataError, "expected all numbers from 0 to 2"),
        ([[0, 1], [-1]], [], DataError, "holds -1, 0, 1: expected all numbers"),
        ([["a"], None], [], DataError, "label None: expected a list of labels"),
        ([["a"], ["a"]], [], DataError, "one class"),
        ([[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]], [], DataError, r"holds 0.5|0.0, a float"),
        ([["a"], ["z"]], ["--label_names", "a", "b"], DataError, "class 'z': expected one of a, b"),
        ([0, 5], ["--label_names", "a", "b"], DataError, "label 5: expected 0 to 1"),
        ([0.5, 1.5], ["--label_names", "a", "b"], ConfigurationError, "no classes"),
        ([0.5, 1.5], ["--distill", "0.5"], ConfigurationError, "no distribution over classes"),
        ([["a"], ["b"]], ["--problem_type", "single_label_classification"], HfGegluError, "expected classes"),
        ([0.5, 1.5], ["--problem_type", "ordinal"], ConfigurationError, "invalid choice"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be(
    place: Path, values: list[Any], flags: list[str], error: type[Exception], message: str
) -> None:
    given = write_task(place, TASK)
    write(TASK, values * 4)
    before = snapshot(place)
    with pytest.raises(error, match=message):
        finetune(parse([*given, *RUN.split(), "--output_dir", "out", *flags], TASK), TASK)
    assert snapshot(place) == before


def test_classes_that_a_table_made_fractions(place: Path) -> None:
    found = run(place, [float(i % 3) for i in range(40)])
    assert any("3 whole numbers; if they are classes: --problem_type single_label" in line for line in found.data)
    found = run(place, [], "--problem_type", "single_label_classification", out="classes")
    assert found.trained.evals[-1].metrics.keys() >= {"accuracy"}


# -- streams -----------------------------------------------------------------------------------------------------------


STREAMS = {
    "seq2seq": [],
    "text_classification": ["--label_names", "animals", "blocks", "values", "silence", "numbers"],
    "token_classification": ["--label_names", "B-X", "I-X", "O"],
}


@pytest.mark.parametrize("task", STREAMS)
def test_a_stream_gives_what_the_table_gives(place: Path, task: Any) -> None:
    """In its own order, read anew when it ends; and it resumes at a number."""
    flags = [*write_task(place, task, rows=14), *STREAMS[task], "--dedup_validation", "false"]
    words = [*flags, *RUN.split(), "--streaming", "--max_eval_samples", "4", "--num_train_epochs", "1"]
    whole = finetune(parse([*words, "--output_dir", "whole"], task), task)
    assert len(whole.trained.steps) == 4
    assert whole.data[0].startswith("training: a stream")
    assert whole.trained.evals[-1].metrics
    stream = set_out(parse([*words, "--output_dir", "x"], task), task)[0].corpus.train
    streamed: list[Any] = list(stream)
    rows = Path(f"{task}.jsonl").read_text().splitlines(keepends=True)
    Path(f"{task}.jsonl").write_text("".join(rows[4:]))  # without those that were held out
    words = [*flags, *RUN.split(), "--validation_split_percentage", "0", "--output_dir", "y"]
    table: Any = set_out(parse(words, task), task)[0].corpus.train
    assert len(table) == len(streamed) == 10
    for number, example in enumerate(streamed):
        assert example.keys() == table[number].keys()
        assert all(torch.equal(example[name], table[number][name]) for name in example)


def test_a_stream_is_refused_early(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("seq2seq", "text_classification", "token_classification"):
        words = ["--model", "absent", "--train_file", "absent.jsonl", "--output_dir", "out", "--streaming"]
        assert main(task, words) == 2
        assert "--streaming without --max_steps" in capsys.readouterr().err  # before anything is looked for
    flags = write_task(place, TASK)
    stream = ["--output_dir", "out", *RUN.split(), "--streaming", "--max_eval_samples", "4"]
    with pytest.raises(ConfigurationError, match=r"nothing says the classes of label.*--label_names"):
        finetune(parse([*flags, *stream], TASK), TASK)
    with pytest.raises(DataError, match="the class 'animals': expected one of a, b"):
        finetune(parse([*flags, *stream, "--label_names", "a", "b"], TASK), TASK)
    assert not (place / "out").exists()
