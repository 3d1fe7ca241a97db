"""Each task from its data to a saved model: converted, with its control, interrupted and resumed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tasks import write_task
from tiny_training import interrupted, one_thread, same_weights, snapshot  # noqa: F401

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import datasets
import transformers
from packaging.version import Version

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training import RunSettings, evaluate
from hf_geglu.training.command_line import parse
from hf_geglu.training.data.pictures import undecoded
from hf_geglu.training.outset import set_out
from hf_geglu.training.run import finetune
from hf_geglu.training.tasks import TASKS, Request

OLD_DATASETS = Version(datasets.__version__) < Version("4")

pytestmark = pytest.mark.usefixtures("place")

NEW = ["sft", "seq2seq", "text_classification", "token_classification", "image_classification"]


RUN = "--max_steps 4 --save_steps 2 --eval_steps 2 --per_device_train_batch_size 3 --learning_rate 1e-2 --use_cpu"


def settings(place: Path, task: Any, *more: str, out: str = "out") -> RunSettings:
    flags = write_task(place, task) if not (place / f"{task}-model").exists() else FLAGS[task]
    FLAGS[task] = flags
    return parse([*flags, *RUN.split(), "--output_dir", out, *more], task)


FLAGS: dict[str, list[str]] = {}


@pytest.mark.parametrize("task", NEW)
def test_converted_with_a_control_interrupted_and_resumed(place: Path, task: Any) -> None:
    whole = finetune(settings(place, task, "--convert", "--control"), task)
    assert whole.control is not None
    first, last = whole.trained.evals[0], whole.trained.evals[-1]
    # GELU blocks convert exactly, T5's ReLU nearly so; a new head is the same one in both
    assert first.nll == pytest.approx(whole.control.evals[0].nll, abs=1e-4)
    assert last.nll != first.nll
    assert whole.trained.losses != whole.control.losses
    assert bool(last.metrics) == (task != "sft")

    interrupted(lambda: finetune(settings(place, task, "--convert", out="again"), task), after=3)
    resumed = finetune(settings(place, task, "--convert", "--resume", out="again"), task)
    assert resumed.trained.losses == whole.trained.losses
    assert [replace(record) for record in resumed.trained.evals] == list(whole.trained.evals)
    kind: Any = getattr(transformers, TASKS[task].auto_class)
    saved = kind.from_pretrained("out")
    assert saved.config.model_type.startswith("geglu")
    assert same_weights(saved, kind.from_pretrained("again"))
    assert (Path("out") / "geglu" / "manifest.json").exists() or list(Path("out").rglob("manifest*.json"))
    assert all(name in whole.table() for name in last.metrics)


@pytest.mark.parametrize("task", NEW)
def test_accumulation_is_weighted_by_what_is_predicted(place: Path, task: Any) -> None:
    how = ("--augment", "false") if task == "image_classification" else ()
    one = finetune(settings(place, task, "--per_device_train_batch_size", "8", *how), task)
    eight = finetune(
        settings(
            place, task, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8", *how, out="eight"
        ),
        task,
    )
    assert eight.trained.losses == pytest.approx(one.trained.losses, rel=2e-5)
    assert [r.predicted for r in one.trained.steps] == [r.predicted for r in eight.trained.steps]
    kind: Any = getattr(transformers, TASKS[task].auto_class)
    weights = [kind.from_pretrained(out).state_dict() for out in ("out", "eight")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-2, atol=1e-4)


def prepared(place: Path, task: Any, *more: str) -> Any:
    found = settings(place, task, *more)
    kind = TASKS[task]
    model = found.model.model_name_or_path
    load: Any = transformers.AutoImageProcessor if kind.reads == "pictures" else transformers.AutoTokenizer
    config = transformers.AutoConfig.from_pretrained(model)
    return kind.prepare(Request(found.data, load.from_pretrained(model), config, found.data.block_size or 24, 0, 24))


def test_the_loss_of_a_chat_is_on_the_answers(place: Path) -> None:
    found = prepared(place, "sft")
    tokenizer = transformers.AutoTokenizer.from_pretrained("sft-model")
    example = found.corpus.train[0]
    answers = [int(t) for t, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]
    text = tokenizer.decode(example["input_ids"])
    spoken = tokenizer.decode(answers)
    assert spoken.count("<eos>") == 2  # each answer ends, and no question does
    parts = [part.split(" <eos>")[0] for part in text.split("<unk> ")[1:]]
    assert spoken.replace(" <eos>", "").split() == " ".join(parts[1::2]).split()[: len(spoken.split()) - 2]
    assert "tokens of answers" in found.corpus.lines[0]
    everything = prepared(place, "sft", "--assistant_only_loss", "false")
    assert (everything.corpus.train[0]["labels"] == everything.corpus.train[0]["input_ids"]).all()


@pytest.mark.parametrize("kind", ["texts", "conversations"])
def test_prompts_and_completions(place: Path, kind: str) -> None:
    settings(place, "sft")
    texts = [("the quick brown", f" {'fox ' * n}jumps") for n in range(1, 8)]
    rows = [{"prompt": a, "completion": b} for a, b in texts]
    if kind == "conversations":
        rows = [
            {"prompt": [{"role": "user", "content": a}], "completion": [{"role": "assistant", "content": b.strip()}]}
            for a, b in texts
        ]
    Path("sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepared(place, "sft", "--validation_split_percentage", "0")
    tokenizer = transformers.AutoTokenizer.from_pretrained("sft-model")
    for number, (_, completion) in enumerate(texts):
        example = found.corpus.train[number]
        answer = tokenizer.decode(example["labels"][example["labels"] != -100])
        assert answer.split() == [*completion.split(), "<eos>"]


def test_a_long_chat_is_cut_and_one_without_an_answer_left_out(place: Path) -> None:
    found = prepared(place, "sft", "--max_length", "12", "--validation_split_percentage", "0")
    assert "40 whose answer lies beyond" not in found.corpus.lines[0]
    assert "documents cut short" in found.corpus.lines[0]
    with pytest.raises(DataError, match=r"40 without an answer within 4 tokens.*--max_length"):
        prepared(place, "sft", "--max_length", "4", "--validation_split_percentage", "0")


def test_a_template_that_rewrites_earlier_turns(place: Path) -> None:
    settings(place, "sft")
    tokenizer = transformers.AutoTokenizer.from_pretrained("sft-model")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} "
        "{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}{% endif %} <eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    Path("t.jinja").write_text(tokenizer.chat_template)
    found = prepared(place, "sft", "--chat_template_path", "t.jinja")
    assert "earlier answers not trained on: the chat template rewrites them" in found.corpus.lines[0]


def test_a_source_reaches_the_decoder_one_place_late(place: Path) -> None:
    found = prepared(place, "seq2seq")
    batch = found.objective.batch([found.corpus.train[i] for i in range(3)], positions=range(3), seed=0)
    assert (batch["decoder_input_ids"][:, 0] == 5).all()
    kept = batch["labels"][:, :-1] != -100
    assert torch.equal(batch["decoder_input_ids"][:, 1:][kept], batch["labels"][:, :-1][kept])
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained("seq2seq-model")
    ours = evaluate(model, [found.corpus.train[i] for i in range(3)], objective=found.objective)
    with torch.no_grad():
        theirs = model(**{k: v for k, v in batch.items() if k != "decoder_input_ids"}).loss
    assert ours.nll == pytest.approx(float(theirs), rel=1e-5)
    assert 0 <= ours.metrics["token_accuracy"] <= 1


def test_words_are_labelled_at_their_first_token(place: Path) -> None:
    found = prepared(place, "token_classification")
    example = found.corpus.train[0]
    assert (example["labels"] != -100).sum() == len(example["input_ids"]) - 0 * 2
    assert found.model_options["id2label"] == {0: "B-X", 1: "I-X", 2: "O"}


def test_classes_and_pairs(place: Path) -> None:
    found = prepared(place, "text_classification")
    assert list(found.model_options["label2id"]) == ["animals", "blocks", "numbers", "silence", "values"]
    rows = [{"sentence1": f"the fox {n}", "sentence2": "a gate " * n, "label": n % 2} for n in range(1, 30)]
    Path("text_classification.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = prepared(place, "text_classification")
    assert pairs.corpus.column == "sentence1 and sentence2"
    assert "cut short at 24" in pairs.corpus.lines[0]
    assert pairs.model_options["num_labels"] == 2


@pytest.mark.parametrize(
    ("task", "rows", "flags", "error", "message"),
    [
        ("text_classification", [{"text": "a", "label": -1}, {"text": "b", "label": 0}], (), DataError, "all numbers"),
        ("text_classification", [{"text": "a", "label": 0}, {"text": "b", "label": 7}], (), DataError, "from 0 to 1"),
        ("text_classification", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], (), DataError, "one class"),
        ("text_classification", [{"text": "a", "label": "x"}, {"text": "b"}], (), DataError, "1 rows have no label"),
        ("text_classification", [{"text": "a", "n": 1}, {"text": "b", "n": 0}], (), DataError, "--label_column"),
        ("text_classification", [{"text": "", "label": 0}, {"text": " ", "label": 1}], (), DataError, "without text"),
        ("text_classification", [{"text": "a", "label": 0}], ("--label_column", "z"), DataError, r"label \(int64\)"),
        ("text_classification", [{"text": "a", "label": 0}], ("--tokenizer_name", "gpt2"), ConfigurationError, "--pad"),
        ("text_classification", [{"text": "a", "label": 0}], ("--pad_token", "zz"), ConfigurationError, "no token of"),
        ("text_classification", [{"text": "a", "label": 0}], ("--max_length", "99"), ConfigurationError, "at most 64"),
        ("token_classification", [{"tokens": ["a"], "ner_tags": ["O", "O"]}] * 2, (), DataError, "one class"),
        ("token_classification", [{"tokens": ["a", "b"], "ner_tags": [0]}, {"tokens": ["a"], "ner_tags": [1]}], (),
         DataError, "2 words and 1 labels"),
        ("token_classification", [{"text": "a", "label": 0}], (), DataError, "list of words"),
        ("seq2seq", [{"a": "x", "b": "y"}], (), DataError, "no source and target"),
        ("seq2seq", [{"source": "", "target": "y"}], (), DataError, "without source and target"),
        ("seq2seq", [{"translation": {"en": "x"}}], ("--source_lang", "de", "--target_lang", "en"), DataError, "no de"),
        ("seq2seq", [{"source": "a", "target": "y"}], ("--model", "gpt2"), ConfigurationError, "no encoder"),
        ("sft", [{"messages": [{"role": "user", "content": "a"}]}], ("--model", "gpt2"), ConfigurationError, "chat"),
        ("sft", [{"n": 1}], (), DataError, "no column messages"),
        ("sft", [{"messages": [{"text": "a"}]}], (), DataError, "expected role and content"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    place: Path, task: Any, rows: Any, flags: tuple[str, ...], error: Any, message: str
) -> None:
    write_task(place, "clm")
    (place / "clm-model").rename(place / "gpt2")
    if task == "seq2seq" and "gpt2" in flags:
        flags = (*flags, "--tokenizer_name", "seq2seq-model")
    given = settings(place, task, "--validation_split_percentage", "0", *flags)
    Path(f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = snapshot(place)
    with pytest.raises(error, match=message):
        finetune(given, task)
    assert snapshot(place) == before


def test_bad_pictures(place: Path) -> None:
    given = settings(place, "image_classification")
    (place / "image_classification-data" / "dark" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0\.png cannot be read"):
        finetune(given, "image_classification")
    (place / "nothing").mkdir()
    empty = replace(given, data=replace(given.data, train_file=["nothing"]))
    with pytest.raises(DataError, match="holds no pictures"):
        finetune(empty, "image_classification")
    assert not Path("out").exists()


PICTURES = "image_classification"


def streamed(place: Path, *more: str, out: str = "out") -> RunSettings:
    """Of pictures in a parquet file, dark and light in turns."""
    if not Path("train.parquet").exists():
        from datasets import load_dataset

        settings(place, PICTURES)
        folder = load_dataset("imagefolder", data_dir=f"{PICTURES}-data", split="train")
        folder.select([i // 2 + 20 * (i % 2) for i in range(40)]).to_parquet("train.parquet")
    flags = ["--model_name_or_path", f"{PICTURES}-model", "--train_file", "train.parquet"]
    return parse([*flags, *RUN.split(), "--max_eval_samples", "6", "--output_dir", out, *more], PICTURES)


def test_a_stream_that_does_not_say_its_columns() -> None:
    from datasets import IterableDataset

    with pytest.raises(ConfigurationError, match="does not say which column"):
        undecoded(IterableDataset.from_generator(lambda: iter([{"image": None}])), "image")


@pytest.mark.skipif(OLD_DATASETS, reason="this version of datasets does not say the columns of a stream")
def test_pictures_of_a_stream_are_those_of_the_table(place: Path) -> None:
    """In its own order, decoded when they are needed."""
    outset: Any = set_out(streamed(place, "--streaming", "--augment", "false"), PICTURES)[0]
    stream, objective, held = outset.corpus.train, outset.objective, outset.corpus.validation
    table: Any = set_out(streamed(place, "--validation_split_percentage", "0", "--augment", "false"), PICTURES)[
        0
    ].corpus.train
    found = list(stream)
    assert (len(found), len(held), len(table)) == (34, 6, 40)
    theirs = [table[i] for i in range(40)]
    for examples, others in ((held, theirs[:6]), (found, theirs[6:])):
        batch, other = (objective.batch(each, positions=range(len(each)), seed=0) for each in (examples, others))
        assert torch.equal(batch["labels"], other["labels"])
        assert torch.equal(batch["pixel_values"], other["pixel_values"])


@pytest.mark.skipif(OLD_DATASETS, reason="this version of datasets does not say the columns of a stream")
def test_a_stream_of_pictures_interrupted_and_resumed(place: Path) -> None:
    whole = finetune(streamed(place, "--streaming"), PICTURES)
    assert whole.data[0] == "training: a stream, read in its own order"
    assert "validation: 6 pictures" in whole.data
    assert whole.trained.evals[-1].metrics.keys() >= {"accuracy"}
    interrupted(lambda: finetune(streamed(place, "--streaming", out="again"), PICTURES), after=3)
    resumed = finetune(streamed(place, "--streaming", "--resume", out="again"), PICTURES)
    assert resumed.trained.losses == whole.trained.losses
    auto = transformers.AutoModelForImageClassification
    assert same_weights(auto.from_pretrained("out"), auto.from_pretrained("again"))


@pytest.mark.skipif(OLD_DATASETS, reason="this version of datasets does not say the columns of a stream")
def test_a_stream_of_a_folder(place: Path) -> None:
    """What is held out does not come again; and that its classes come one after the other is said."""
    words = ["--streaming", "--max_eval_samples", "3"]
    settings(place, PICTURES)
    dark, light = (Path(f"{PICTURES}-data") / name for name in ("dark", "light"))
    (light / "again.png").write_bytes((dark / "0.png").read_bytes())  # the first one, which is held out
    found = prepared(place, PICTURES, *words)
    assert len(list(found.corpus.train)) == 37
    assert not any("one class" in line for line in found.corpus.lines)
    for number in range(60):
        (dark / f"more{number}.png").write_bytes((dark / "2.png").read_bytes())
    assert any("begins with 64 rows of one class" in line for line in prepared(place, PICTURES, *words).corpus.lines)


@pytest.mark.skipif(OLD_DATASETS, reason="this version of datasets does not say the columns of a stream")
def test_a_stream_of_pictures_that_breaks(place: Path) -> None:
    given = streamed(place, "--streaming", "--label_names", "dark", "light")
    from datasets import Dataset, Features, Image, Value

    rows = Dataset.from_parquet("train.parquet").cast_column("image", Image(decode=False)).to_list()
    rows[10]["image"] = {"bytes": b"no picture", "path": None}
    features = Features({"image": Image(decode=False), "label": Value("int64")})
    Dataset.from_list(rows, features=features).cast_column("image", Image()).to_parquet("train.parquet")
    with pytest.raises(DataError, match=r"the picture of row 4 cannot be read"):
        finetune(given, PICTURES)
    with pytest.raises(ConfigurationError, match="nothing says the classes of label"):
        finetune(streamed(place, "--streaming", out="unnamed"), PICTURES)
    assert not Path("unnamed").exists()


def test_crops_depend_on_seed_and_position_only(place: Path) -> None:
    found = prepared(place, "image_classification")
    train = [found.corpus.train[i] for i in range(4)]
    alone = found.objective.batch(train[2:3], positions=[17], seed=1)["pixel_values"][0]
    among = found.objective.batch([train[0], train[2]], positions=[3, 17], seed=1)["pixel_values"]
    assert torch.equal(alone, among[1])
    assert not torch.equal(alone, found.objective.batch(train[2:3], positions=[18], seed=1)["pixel_values"][0])
    held = [found.corpus.validation[0]]
    same = [found.objective.batch(held, positions=[n], seed=n)["pixel_values"] for n in (1, 2)]
    assert torch.equal(*same)


def test_a_decoder_classifies_with_a_padding_token_that_is_named(place: Path) -> None:
    settings(place, "text_classification")
    write_task(place, "clm")
    given = settings(place, "text_classification", "--model", "clm-model", "--pad_token", "<eos>")
    result = finetune(given, "text_classification")
    assert math.isfinite(result.trained.evals[-1].nll)
    assert transformers.AutoConfig.from_pretrained("out").pad_token_id == 1
