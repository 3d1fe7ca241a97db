"""A recipe that pushes what it has made: refused before anything is loaded, or pushed and read back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from tiny_tasks import write_task

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

RUN = "--max_steps 2 --save_steps 0 --per_device_train_batch_size 2 --use_cpu --block_size 16 --output_dir out"
CODE = "import sys; from hf_geglu.training.command_line import main; sys.exit(main('clm', sys.argv[1:]))"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def run(place: Path, environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    environment = environment | {"HF_DATASETS_CACHE": str(place / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, *RUN.split(), *flags, "--push_to_hub"],
        **{"cwd": place, "env": environment, "capture_output": True, "text": True, "check": False},
    )


def test_what_cannot_be_pushed_is_refused_before_anything_is_loaded(tmp_path: Path, hub: HubServer) -> None:
    nothing = ["--model_name_or_path", "absent", "--train_file", "absent.jsonl"]
    login = hub.environment(tmp_path)
    for environment, flags, message in (
        (hub.environment(tmp_path, token=None), [], "a push to out without a login"),
        (login | {"HF_TOKEN": "hf_wrong"}, [], "a push to out will not do"),
        (login, ["--hub_model_id", "them/model"], "them/model belongs to them: expected one of me, us"),
        (login, ["--hub_model_id", "me/a/b"], "me/a/b is no name of a repository"),
    ):
        done = run(tmp_path, environment, *nothing, *flags)
        assert done.returncode == 2
        assert message in done.stderr
        assert "hf_wrong" not in done.stdout + done.stderr
    dense = run(tmp_path, login, *write_task(tmp_path, "clm"))
    assert "--push_to_hub of a GPT2LMHeadModel that is not converted" in dense.stderr
    assert not (tmp_path / "out").exists()
    assert not hub.repos


def test_a_run_that_ends_on_the_hub(tmp_path: Path, hub: HubServer) -> None:
    flags, login = [*write_task(tmp_path, "clm"), "--convert"], hub.environment(tmp_path)
    unlicensed = run(tmp_path, login, *flags)  # the base has no card
    assert unlicensed.returncode == 2
    assert "names no licence" in unlicensed.stderr
    assert "`hf-geglu push out me/out`" in unlicensed.stderr
    assert (tmp_path / "out" / "config.json").is_file()
    assert not hub.repos
    (tmp_path / "clm-model" / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    done = run(tmp_path, login, *flags, "--overwrite_output_dir", "--hub_model_id", "us/variant")
    assert done.returncode == 0, done.stderr
    assert "pushed, downloaded again and verified: " in done.stdout
    assert hub.repos.keys() == {"us/variant"}
    assert hub.repos["us/variant"].private
