"""Which files of a folder go to the Hub, and which of them must not."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_geglu.hub.privacy import find_secrets, find_traces

LEFT_BEHIND = (
    *(".*", "*/.*", "*.tmp", "*.log", "*_log.jsonl", "__pycache__", "*.pyc"),
    *("checkpoint-*", "control", "runs", "wandb", "settings.json", "results.json", "ledger.json"),
    *("optimizer.*", "scheduler.*", "rng*", "progress.json", "trainer_state.json", "training_args.bin"),
)
"""What training and editors leave beside a model. It stays at home, and that is said."""

SECRET_NAMES = (
    *(".env", ".env.*", "*.env", ".netrc", "_netrc", ".git-credentials", ".npmrc", ".pypirc", ".htpasswd"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "*.jks", "*.kdbx"),
    *("credentials", "credentials.*", "*secret*", "*password*", "*passwd*", "token", "token.txt", "*_token", "*.token"),
    *("service-account*.json", "stored_tokens", "kaggle.json"),
)
"""Names of files that hold credentials, whatever is in them."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.dill")
"""Run code when they are opened; weights travel as safetensors."""

_TEXT = (".json", ".jsonl", ".md", ".txt", ".py", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".jinja", ".csv", ".sh", "")
_WORD_LISTS = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""Vocabularies hold every kind of word and no paths of ours; they are searched for secrets only."""
_LICENCES = ("LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The files of a folder, sorted.

    Attributes:
        files: to upload, by path in the repository.
        left: that stay at home.
        problems: each a clause that says which file must not be published and why.
    """

    files: dict[str, Path]
    left: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all files to upload."""
        return sum(path.stat().st_size for path in self.files.values())


def select_files(folder: Path) -> Selection:
    """Look at every file of a folder: its name, and of texts the content."""
    files: dict[str, Path] = {}
    left: list[str] = []
    problems: list[str] = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        if _matches(path.name, SECRET_NAMES):  # before what is left behind: its owner wants to know
            problems.append(f"{name} has the name of a file that holds credentials; move it out of the folder")
        elif _left_behind(name):
            left.append(name)
        elif _matches(path.name, PICKLES):
            problems.append(f"{name} is a pickle, which runs code when it is opened; save weights as safetensors")
        else:
            files[name] = path
            problems += [f"{name} {what}" for what in _content(path)]
    return Selection(files=files, left=tuple(left), problems=tuple(problems))


def _left_behind(name: str) -> bool:
    parts = name.split("/")
    return any(_matches(part, LEFT_BEHIND) for part in parts)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern.lower()) for pattern in patterns)


def _content(path: Path) -> Iterator[str]:
    if path.suffix.lower() not in _TEXT:
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        yield "is called a text and holds other bytes; look what it is"
        return
    for what in find_secrets(text):
        yield f"holds what looks like {what}; remove it, and revoke it if it was real"
    if path.name in _WORD_LISTS or _matches(path.name, _LICENCES):
        return
    for trace in sorted(set(find_traces(text))):
        yield f"names {trace} of this machine; take it out"
