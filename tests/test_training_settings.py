"""Command lines and settings: the names people know, and an error that helps."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from hf_geglu.errors import ConfigurationError
from hf_geglu.training import DataSettings, ModelSettings, OutputSettings, RunSettings, TrainSettings
from hf_geglu.training.command_line import NOT_NEEDED, main, parse
from hf_geglu.training.config_file import replayable
from hf_geglu.training.reports.log import to_json
from hf_geglu.training.tasks import TASKS

NEEDED = ["--model_name_or_path", "gpt2", "--train_file", "a.txt", "--output_dir", "out"]


def parsed(*more: str) -> RunSettings:
    return parse([*NEEDED, *more])


def test_defaults() -> None:
    assert parsed() == RunSettings(
        model=ModelSettings(model_name_or_path="gpt2"),
        data=DataSettings(train_file=["a.txt"]),
        train=TrainSettings(),
        output=OutputSettings(output_dir="out"),
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--per_device_train_batch_size", "3", "--bf16", "--max_steps", "7"],
        ["--per-device-train-batch-size", "3", "--bf16", "--max-steps", "7"],
        ["--per-device_train-batch_size=3", "--bf16=true", "--max_steps=7"],
        ["--batch-size", "3", "--bf16", "True", "--max-steps", "7"],
    ],
)
def test_dashes_and_underscores(flags: list[str]) -> None:
    train = parsed(*flags).train
    assert (train.per_device_train_batch_size, train.bf16, train.max_steps) == (3, True, 7)


@pytest.mark.parametrize(
    ("flags", "where", "value"),
    [
        (["--max_seq_length", "32"], ("data", "block_size"), 32),
        (["--max_length", "32"], ("data", "block_size"), 32),
        (["--dataset_text_field", "body"], ("data", "text_column"), "body"),
        (["--overwrite"], ("output", "overwrite_output_dir"), True),
        (["--overwrite_output_dir"], ("output", "overwrite_output_dir"), True),
        (["--resume"], ("output", "resume"), "latest"),
        (["--resume_from_checkpoint", "checkpoint-3"], ("output", "resume"), "checkpoint-3"),
        (["--torch_dtype", "auto"], ("train", "dtype"), "auto"),
        (["--mixed_precision", "bf16"], ("train", "mixed_precision"), "bf16"),
        (["--validation_file", "b.txt", "c.txt"], ("data", "validation_file"), ["b.txt", "c.txt"]),
        (["--layers", "0-3", "--convert"], ("model", "layers"), "0-3"),
        (["--learning_rate", "1e-4"], ("train", "learning_rate"), 1e-4),
    ],
)
def test_names_that_people_know(flags: list[str], where: tuple[str, str], value: Any) -> None:
    assert getattr(getattr(parsed(*flags), where[0]), where[1]) == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lerning_rate", "1"], r"unknown flag --lerning_rate: did you mean --learning_rate\?"),
        (["--batchsize", "1"], r"did you mean --batch_size\?"),
        (["--do-train"], "unknown flag --do_train: a run always trains"),
        (["--zzzzzzz"], "unknown flag --zzzzzzz: expected one of those"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--lr_scheduler_type", "wavy"], "invalid choice: 'wavy'"),
        (["--max_steps", "0"], "max_steps=0: expected 1 or more, or -1"),
        (["--num_train_epochs", "0"], "num_train_epochs=0.0: expected more than 0"),
        (["--per_device_train_batch_size", "0"], "expected 1 or more"),
        (["--learning_rate", "-1"], "learning_rate=-1.0: expected 0 or more"),
        (["--adam_beta1", "1"], "adam_beta1"),
        (["--warmup_steps", "5", "--warmup_ratio", "0.1"], "one of the two"),
        (["--bf16", "--fp16"], "bf16 and fp16: expected one mixed precision"),
        (["--bf16", "--mixed_precision", "no"], "one mixed precision"),
        (["--lr_scheduler_kwargs", "{'min_lr': 1}"], "is no JSON"),
        (["--lr_scheduler_kwargs", "[1]"], "expected a JSON object"),
        (["--early_stopping_patience", "2"], "early_stopping_patience=2 without eval_steps"),
        (["--hub_model_id", "me/x"], "--hub_model_id me/x without --push_to_hub"),
        (["--streaming"], "--streaming without --max_steps"),
        (["--control"], "--control without --convert"),
        (["--layers", "0-3"], "--layers 0-3 without --convert"),
        (["--dataset_name", "x"], "--dataset_name and --train_file: expected one"),
        (["--resume", "--overwrite"], "--overwrite_output_dir and --resume"),
        (["--validation_split_percentage", "100"], "expected 0 <= percentage < 100"),
        (["--mlm_probability", "0.2"], "--mlm_probability is a flag of mlm: the recipe clm has none of it"),
        (["--label_column", "x"], "is a flag of image_classification, text_classification, token_classification"),
        (["--source_lang", "en"], "--source_lang is a flag of seq2seq"),
        (["--dataset_revision", "main"], "--dataset_revision main without --dataset_name"),
        (["--block_size", "1"], "block_size=1: expected 4 or more"),
        (["--max_train_samples", "0"], "max_train_samples=0"),
        (["--save_total_limit", "-1"], "save_total_limit=-1"),
    ],
)
def test_errors(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parsed(*flags)


def test_what_is_required() -> None:
    with pytest.raises(ConfigurationError, match="required: --model_name_or_path"):
        parse([])
    with pytest.raises(ConfigurationError, match="no dataset: expected one of --dataset_name, --train_file"):
        parse(["--model", "gpt2", "--output_dir", "out"])
    with pytest.raises(ConfigurationError, match="'gpt2' belongs to no flag"):
        parse([*NEEDED, "gpt2"])


def test_flags_of_other_scripts_are_no_flags_of_ours() -> None:
    names = {f"--{field.name}" for group in GROUPS for field in dataclasses.fields(group)}
    assert not names & NOT_NEEDED.keys()


GROUPS: tuple[Any, ...] = (ModelSettings, DataSettings, TrainSettings, OutputSettings)


@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_explains_itself(group: Any) -> None:
    assert dataclasses.fields(group)
    assert all(field.metadata["help"] for field in dataclasses.fields(group))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main("clm", ["--help"], prog="finetune_clm.py", description="Paste\n    this")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "Paste\n    this" in out
    assert "--gradient_accumulation_steps" in out
    assert "--eval_steps STEPS " in out
    assert "[0 = off]" in out
    assert "--mlm_probability" not in out


@pytest.mark.parametrize("task", TASKS)
def test_help_of_each_recipe_fits_two_screens(task: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parent.parent / "scripts" / f"finetune_{task}.py"
    with pytest.raises(SystemExit):
        main(task, ["--help"], prog=script.name, description=ast.get_docstring(ast.parse(script.read_text())))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 108
    assert max(map(len, lines)) <= 120


def test_a_file_and_flags_together(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "model_name_or_path: gpt2\ntrain-file: [a.txt, b.txt]\ntrain: {max_steps: 7, bf16: true, weight_decay: 0.1}\n"
        "output_dir: out\nlr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 2}\neval_steps: null\n"
    )
    found = parse(["--config", str(file), "--max_steps", "9", "--train_file", "c.txt", "--bf16", "false"])
    assert (found.model.model_name_or_path, found.output.output_dir) == ("gpt2", "out")
    assert (found.train.max_steps, found.train.bf16, found.train.weight_decay) == (9, False, 0.1)
    assert found.data.train_file == ["c.txt"]
    assert found.train.scheduler_kwargs() == {"num_cycles": 2}
    assert found.train.eval_steps == 0


def test_saved_settings_can_be_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = parse(
        [
            *NEEDED,
            "--dedup_validation",
            "false",
            "--lr_scheduler_kwargs",
            '{"a": 1}',
            "--train_file",
            str(tmp_path / "a b.txt"),
        ],
        "sft",
    )
    Path("settings.json").write_text(to_json(replayable(given, "sft")))
    again = parse(["--config", "settings.json"], "sft")
    assert again == dataclasses.replace(given, data=dataclasses.replace(given.data, train_file=["a b.txt"]))
    with pytest.raises(ConfigurationError, match="is of the recipe sft: expected clm"):
        parse(["--config", "settings.json"], "clm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "unknown key lerning_rate in --config c.yaml: did you mean learning_rate?"),
        ("train: {qqqqq: 1}", "unknown key qqqqq in --config c.yaml: expected the name of a flag"),
        ("mlm_probability: 0.2", "unknown key mlm_probability"),
        ("- a", "holds a list: expected lines"),
        ("max_steps: 1\nmax_steps: 2", "says max_steps twice: expected each setting once"),
        ("train: {seed: 1, seed: 2}", "says seed twice"),
        ("max_steps: 1\ntrain: {max-steps: 2}", "says max-steps twice, once as max_steps"),
        ("a: [", "is no YAML"),
        ("max_steps: many", "invalid int value: 'many'"),
    ],
)
def test_a_file_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        parse([*NEEDED, "--config", str(tmp_path / "c.yaml")])
    with pytest.raises(ConfigurationError, match=r"absent\.yaml cannot be read"):
        parse([*NEEDED, "--config", str(tmp_path / "absent.yaml")])


def test_an_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("clm", [*NEEDED, "--lerning_rate", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: unknown flag --lerning_rate: did you mean --learning_rate?\n"
    assert captured.out == ""


def test_only_the_first_process_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main("clm", [*NEEDED, "--lerning_rate", "1"]) == 2
    assert capsys.readouterr().err == ""
