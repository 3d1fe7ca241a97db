"""What must not leave this machine: absolute paths, secrets, the names of user and host."""

from __future__ import annotations

import getpass
import re
import shlex
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

_ROOTS = "bin boot data dev etc home lib media mnt nix opt private proc root run scratch srv storage sys tmp usr users"
_ROOTS += " var volumes work workspace kaggle content"
_POSIX_PATH = re.compile(
    rf"(?<![\w./:\-<])(?:file://)?/(?:{'|'.join(_ROOTS.split())})(?:/[\w.@+~%=,-]+)+/?", flags=re.IGNORECASE
)
_ANY_PATH = re.compile(r"(?<![\w./:\-<>)])/[\w.@+~%=,-]+(?:/[\w.@+~%=,-]+)+/?")
"""In texts that we write: two components are a path, whatever the first is called."""
_HOME = re.compile(r"(?<![\w/])~[\w-]*/[\w.@+~%=,/-]+")
_WINDOWS_PATH = re.compile(r"(?<![\w])(?:[A-Za-z]:\\+|\\\\)[\w.$ -]+(?:\\+[\w.$ -]+)*")

SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a Hugging Face organisation token": re.compile(r"\bapi_org_[A-Za-z0-9]{20,}"),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})"),
    "a GitLab token": re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "an OpenAI or Anthropic key": re.compile(r"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}"),
    "a Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "a Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b"),
    "a Weights & Biases key": re.compile(r"WANDB_API_KEY\W{1,4}[0-9a-f]{40}"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "a password in an address": re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/@\"']+@"),
}
"""Shapes of credentials, by what they are; none of them is a word of a language or of a vocabulary."""

_SECRET_OPTION = re.compile(r"-{1,2}(?:\w+[-_])*(?:token|key|password|passwd|secret|auth)(?:[-_]\w+)*", re.IGNORECASE)
_NOT_SECRET = re.compile(r"(?:max|new|num|eos|bos|pad|min|mask|special|add)[-_]", re.IGNORECASE)


def scrub(text: str) -> str:
    """`text` with every absolute path cut to its last component and every secret replaced."""
    for pattern in SECRETS.values():
        text = pattern.sub("REMOVED", text)
    for pattern in (_POSIX_PATH, _ANY_PATH, _HOME):
        text = pattern.sub(lambda match: PurePosixPath(match[0]).name, text)
    return _WINDOWS_PATH.sub(lambda match: PureWindowsPath(match[0]).name, text)


def scrubbed(value: Any) -> Any:
    """`scrub` for every string in a structure of plain JSON types."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {scrub(str(key)): scrubbed(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(entry) for entry in value]
    return value


def find_secrets(text: str) -> Iterator[str]:
    """What credentials a text seems to hold: "a GitHub token"... never the credential itself."""
    for what, pattern in SECRETS.items():
        if pattern.search(text):
            yield what


def find_traces(text: str) -> Iterator[str]:
    """What a text tells of the machine: absolute paths, and the names of its host and user where they are no common
    words."""
    for pattern in (_POSIX_PATH, _HOME, _WINDOWS_PATH):
        for match in pattern.finditer(text):
            yield f"the path {match[0]!r}"
    for what, name in _own_names():
        if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            yield f"the {what} {name!r}"


def _own_names() -> Iterator[tuple[str, str]]:
    common = {"localhost", "root", "user", "admin", "ubuntu", "jovyan", "runner", "main", "default", "model"}
    names = [("host name", socket.gethostname())]
    with suppress(KeyError, OSError):  # a container whose user has no entry
        names.append(("user name", getpass.getuser()))
    for what, name in names:
        if len(name) >= 4 and name.lower() not in common:
            yield what, name


def command_line(words: Sequence[str]) -> str:
    """A command as it may be shown: the program by its name, paths by their last component, values of options that hold
    a secret replaced.

    Args:
        words: such as `sys.argv`.
    """
    if not words:
        return ""
    shown, hide = [Path(words[0]).name], False
    for word in words[1:]:
        option, equals, value = word.partition("=")
        secret = bool(_SECRET_OPTION.fullmatch(option)) and not _NOT_SECRET.search(option)
        if hide:
            shown.append("REMOVED")
        elif secret and equals:
            shown.append(f"{option}=REMOVED")
        elif equals and option.startswith("-"):
            shown.append(f"{option}={_short(value)}")
        else:
            shown.append(_short(word))
        hide = secret and not equals and not hide
    return scrub(shlex.join(shown))


def _short(word: str) -> str:
    is_path = Path(word).is_absolute() or PureWindowsPath(word).is_absolute() or word.startswith(("~", ".."))
    return (PureWindowsPath(word).name if "\\" in word else Path(word).name) if is_path else word
