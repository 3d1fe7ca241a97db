"""The recipes as people run them: by python and by accelerate launch."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_tasks import write_task
from tiny_training import lines, saved_model, snapshot

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from accelerate import FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM

from hf_geglu.hub.verifying import verify_variant

SCRIPTS = Path(__file__).parent.parent / "scripts"
needs_fsdp2 = pytest.mark.skipif(
    "fsdp_version" not in inspect.signature(FullyShardedDataParallelPlugin).parameters,
    reason="this accelerate has FSDP 1 only",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    saved_model(folder / "gpt2", "clm")
    saved_model(folder / "bert", "mlm")
    (folder / "text.txt").write_text("".join(line + "\n" for line in lines(80)))
    return folder


def run(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(place / "cache"),
    }
    return subprocess.run(
        [sys.executable, *command], cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


def test_a_causal_recipe_with_underscores(place: Path) -> None:
    flags = "--model_name_or_path gpt2 --train_file text.txt --block_size 16 --max_steps 2 --output_dir a --use_cpu"
    done = run(place, str(SCRIPTS / "finetune_clm.py"), *flags.split())
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert len(losses(place / "a")) == 2
    assert (place / "a" / "config.json").exists()
    assert "nll at step 0" in done.stdout
    assert "step 2/2  loss" in done.stderr


def test_a_masked_recipe_with_dashes_a_conversion_and_a_control(place: Path) -> None:
    flags = (
        "--model-name-or-path bert --train-file text.txt --max-seq-length 16 --max-steps 2 --output-dir b --convert "
        "--control --use-cpu"
    )
    done = run(place, str(SCRIPTS / "finetune_mlm.py"), *flags.split())
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert len(losses(place / "b")) == len(losses(place / "b" / "control")) == 2
    heads = [" ".join(line.split()[:1]) for line in done.stdout.splitlines()]
    start = heads.index("first")  # below what libraries print when they are imported
    assert heads[start + 1 : start + 3] == ["converted", "control"]


def test_an_error_is_one_line_without_a_traceback(place: Path) -> None:
    before = snapshot(place)
    flags = "--model gpt2 --train_file text.txt --max_steps 2 --output_dir gpt2 --use_cpu"
    done = run(place, str(SCRIPTS / "finetune_clm.py"), *flags.split())
    assert done.returncode == 2
    assert done.stdout == ""
    # torchao, where it is installed, has things to say at import; they come before
    *_, ours = done.stderr.splitlines()
    assert ours.startswith("error: --output_dir gpt2 is not empty")
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert snapshot(place) == before


@pytest.mark.parametrize(
    "task", ["sft", "seq2seq", "text_classification", "token_classification", "image_classification"]
)
def test_each_other_recipe_runs_and_its_settings_can_be_given_again(task: str, tmp_path: Path) -> None:
    flags = write_task(tmp_path, task, rows=12)
    flags += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "--output_dir", "out"]
    script = str(SCRIPTS / f"finetune_{task}.py")
    done = run(tmp_path, script, *flags)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert len(losses(tmp_path / "out")) == 2
    assert "training: " in done.stderr
    again = run(tmp_path, script, "--config", "out/settings.json", "--output_dir", "again")
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "again") == losses(tmp_path / "out")


@pytest.mark.parametrize("name", sorted(path.name for path in SCRIPTS.glob("finetune_*.py")))
def test_a_recipe_can_be_read_in_one_go_and_pasted_from(name: str) -> None:
    text = (SCRIPTS / name).read_text()
    assert len(text.splitlines()) < 60
    assert "On a CPU" in text
    assert "accelerate launch" in text


@pytest.mark.slow
def test_a_recipe_is_launched_by_accelerate(place: Path) -> None:
    flags = "--model gpt2 --train_file text.txt --block_size 16 --max_steps 2 --output_dir c"
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "bf16", "--dynamo_backend", "no"]
    done = run(place, *launch, str(SCRIPTS / "finetune_clm.py"), *flags.split())
    assert done.returncode == 0, done.stderr
    launched = losses(place / "c")
    alone = run(place, str(SCRIPTS / "finetune_clm.py"), *flags.split()[:-1], "d", "--bf16", "--use_cpu")
    assert alone.returncode == 0, alone.stderr
    assert launched == losses(place / "d")


def launched_by(config: str) -> list[str]:
    return [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(SCRIPTS / "accelerate" / config),
        "--main_process_port",
        "0",
    ]


@pytest.mark.parametrize("config", sorted(path.name for path in (SCRIPTS / "accelerate").iterdir()))
def test_accelerate_reads_the_config_files(config: str) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args([*launched_by(config)[2:], "script.py"])
    read, defaults, _ = _validate_launch_command(arguments)
    ways = {"ddp": read.multi_gpu, "fsdp2": read.use_fsdp, "zero2": read.use_deepspeed}
    assert [way for way, on in ways.items() if on] == [config.removesuffix(".yaml").removesuffix("_cpu")]
    assert read.num_processes == (2 if config.endswith("_cpu.yaml") else 8)
    assert defaults.use_cpu == config.endswith("_cpu.yaml")
    if read.use_fsdp and hasattr(read, "fsdp_version"):
        assert int(read.fsdp_version) == 2
        assert read.fsdp_cpu_ram_efficient_loading in (False, "false")


@needs_fsdp2
def test_a_recipe_shares_the_model_out(place: Path) -> None:
    """What is saved is an ordinary variant, with the logits of the one that a single process has trained."""
    flags = "--model gpt2 --train_file text.txt --block_size 16 --max_steps 3 --eval_steps 2 --save_steps 2 --convert"
    flags += " --learning_rate 1e-2 --per_device_train_batch_size"
    script = [str(SCRIPTS / "finetune_clm.py"), *flags.split()]
    alone = run(place, *script, "6", "--use_cpu", "--output_dir", "whole")
    assert alone.returncode == 0, alone.stderr
    two = run(place, *launched_by("fsdp2_cpu.yaml"), *script, "3", "--output_dir", "shares")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("saved in shares") == 1
    assert losses(place / "shares") == pytest.approx(losses(place / "whole"), rel=1e-6)
    assert {path.name for path in (place / "shares").iterdir()} == {path.name for path in (place / "whole").iterdir()}
    model, other = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("shares", "whole"))
    assert type(model) is type(other)
    ids = torch.arange(6, 14)[None]
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    assert verify_variant(place / "shares").ok


@pytest.mark.slow
@needs_fsdp2
@pytest.mark.parametrize(
    "task", ["sft", "seq2seq", "text_classification", "token_classification", "image_classification"]
)
def test_each_other_recipe_shares_the_model_out(task: str, tmp_path: Path) -> None:
    flags = [*write_task(tmp_path, task, rows=12), "--max_steps", "2", "--learning_rate", "1e-2", "--convert"]
    script = [str(SCRIPTS / f"finetune_{task}.py"), *flags, "--per_device_train_batch_size"]
    alone = run(tmp_path, *script, "4", "--use_cpu", "--output_dir", "whole")
    assert alone.returncode == 0, alone.stderr
    two = run(tmp_path, *launched_by("fsdp2_cpu.yaml"), *script, "2", "--output_dir", "shares")
    assert two.returncode == 0, two.stderr
    assert losses(tmp_path / "shares") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
def test_two_processes_do_what_one_does(place: Path) -> None:
    flags = "--train_file text.txt --block_size 16 --max_steps 4 --eval_steps 2 --save_steps 2 --learning_rate 1e-2"
    launch = launched_by("ddp_cpu.yaml")
    for name, task in (("gpt2", "clm"), ("bert", "mlm")):
        script = [str(SCRIPTS / f"finetune_{task}.py"), "--model", name, *flags.split()]
        alone = run(place, *script, "--use_cpu", "--per_device_train_batch_size", "6", "--output_dir", f"one-{task}")
        assert alone.returncode == 0, alone.stderr
        both = [*launch, *script, "--gradient_accumulation_steps", "3", "--per_device_train_batch_size", "1"]
        done = run(place, *both, "--output_dir", f"two-{task}", "--save_total_limit", "0")
        assert done.returncode == 0, done.stderr
        assert losses(place / f"two-{task}") == pytest.approx(losses(place / f"one-{task}"), rel=1e-4)
        evals = [
            [json.loads(line) for line in (place / f"{n}-{task}" / "eval_log.jsonl").read_text().splitlines()]
            for n in ("one", "two")
        ]
        for one, two in zip(*evals, strict=True):
            assert (one["step"], one["tokens"]) == (two["step"], two["tokens"])
            assert one["nll"] == pytest.approx(two["nll"], rel=1e-4)
        checkpoint = place / f"two-{task}" / "checkpoint-2"
        assert sorted(path.name for path in checkpoint.glob("rng-*")) == ["rng-0.safetensors", "rng-1.safetensors"]
        before = losses(place / f"two-{task}")
        again = run(place, *both, "--output_dir", f"two-{task}", "--save_total_limit", "0", "--resume", "checkpoint-2")
        assert again.returncode == 0, again.stderr
        assert losses(place / f"two-{task}") == pytest.approx(before, rel=1e-6)
