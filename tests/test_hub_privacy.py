"""No secret and no trace of the machine gets into a manifest, a card or a repository."""

import getpass
import socket

import pytest

from hf_geglu.hub.privacy import command_line, find_secrets, find_traces, scrub, scrubbed
from hf_geglu.hub.selection import select_files

# joined here, so that this file does not look like one that holds secrets
SECRETS = [
    "hf_" + "a1B2" * 8,
    "ghp_" + "x" * 36,
    "github_pat_" + "x" * 50,
    "AKIA" + "ABCD" * 4,
    "sk-ant-" + "x" * 40,
    "xoxb-" + "1" * 12,
    "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "https://me:pass" + "word@example.org/x",
]
PATHS = ["/home/ada/models/gpt2", "/mnt/disk/x.json", "~/models/gpt2", "C:\\Users\\ada\\gpt2", "/data/run/"]
HARMLESS = [
    "tokens/s and/or",
    "https://huggingface.co/docs/hub/model-cards",
    "openai-community/gpt2",
    "encoder.layer.0/intermediate",
    "hf_geglu_undo_of_a_very_long_name_that_is_no_token",
    "[Held-out loss](geglu/loss.png)",
    "1/2 (z + 3/4)",
    "<br/> </div>",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_found_and_removed(secret):
    text = f"token = '{secret}' # do not share"
    assert list(find_secrets(text))
    assert secret not in scrub(text)


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_found_and_cut(path):
    text = f'loaded from "{path}", and {path}'
    assert list(find_traces(text))
    assert not list(find_traces(scrub(text)))
    assert path.replace("\\", "/").rstrip("/").rpartition("/")[2] in scrub(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_texts_stay(text):
    assert scrub(text) == text
    assert not list(find_traces(text))
    assert not list(find_secrets(text))


def test_names_of_host_and_user(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-box-17")
    monkeypatch.setattr(getpass, "getuser", lambda: "ada.lovelace")
    assert list(find_traces("trained on gpu-box-17")) == ["the host name 'gpu-box-17'"]
    assert list(find_traces("by ada.lovelace")) == ["the user name 'ada.lovelace'"]
    assert not list(find_traces("gpu-box-170 and ada.lovelaces"))


def test_structures_are_scrubbed_throughout():
    value = {"a": ["/home/ada/x", {"/home/ada/k": "/home/ada/y"}], "n": 1, "f": 0.5, "none": None}
    assert scrubbed(value) == {"a": ["x", {"k": "y"}], "n": 1, "f": 0.5, "none": None}


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["/usr/bin/hf-geglu", "convert", "/home/ada/gpt2", "out"], "hf-geglu convert gpt2 out"),
        (["hf-geglu", "push", "x", "me/x", "--token", "abc"], "hf-geglu push x me/x --token REMOVED"),
        (["x.py", "--hub_token=abc", "--max_new_tokens", "5"], "x.py --hub_token=REMOVED --max_new_tokens 5"),
        (["x.py", "--train_file=/data/a.txt", "--lr", "1e-4"], "x.py --train_file=a.txt --lr 1e-4"),
        (["x.py", "--tokenizer_name", "org/name", "../up/a b"], "x.py --tokenizer_name org/name 'a b'"),
        ([], ""),
    ],
)
def test_commands_are_shown_without_places_and_secrets(words, shown):
    assert command_line(words) == shown


def test_files_that_must_not_go_up(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "/home/ada/base"}')
    (tmp_path / "notes.md").write_text(f"login: {SECRETS[0]}")
    (tmp_path / ".env").write_text("A=1")
    (tmp_path / "id_rsa").write_text("x")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    (tmp_path / "tokenizer.json").write_text('{"vocab": ["/home/ada/x", "root"]}')
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 9)
    for left in ("settings.json", "train_log.jsonl", ".DS_Store"):
        (tmp_path / left).write_text(f"/home/ada {SECRETS[0]}")
    for folder in ("checkpoint-7", "control", "__pycache__"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").write_text("{}")
    found = select_files(tmp_path)
    assert set(found.files) == {"config.json", "notes.md", "README.md", "tokenizer.json", "model.safetensors"}
    assert set(found.left) >= {"settings.json", "train_log.jsonl", ".DS_Store", "checkpoint-7/x.json", "control/x.json"}
    told = "\n".join(found.problems)
    assert len(found.problems) == 6
    for expected in (
        "config.json names the path '/home/ada/base'",
        "notes.md holds what looks like a Hugging Face token",
        ".env has the name",
        "id_rsa has the name",
        "pytorch_model.bin is a pickle",
        "README.md is called a text",
    ):
        assert expected in told
    assert SECRETS[0] not in told
