"""The other files of a checkpoint: which belong to the variant as they are, which do not, and why."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hf_geglu.errors import WeightsError
from hf_geglu.hub.companions import MODULES, module_folders

_MADE_ANEW = ("config.json", "generation_config.json", "modeling_geglu.py")
_CARD = "README.md"
_LICENCES = ("license", "licence", "notice", "copying", "use_policy", "acceptable_use")
_TEXTS = (".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".vocab", ".spm")
_STATES = (
    "trainer_state.json",
    "training_args.json",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
)


@dataclass(frozen=True, slots=True)
class Belongings:
    """The files of a source folder besides its weights, as paths relative to it."""

    carried: tuple[str, ...]
    left: tuple[str, ...]
    """Not carried over: the base's card, weights in other formats, states of a training run, hidden files."""


def belongings(folder: Path, weights: tuple[str, ...], *, code: bool) -> Belongings:
    """Sort the files of a source folder.

    Args:
        folder: of the source.
        weights: names of the files that are converted, and of their index.
        code: the variant is loaded by Python files of this folder, so they go along.

    Raises:
        WeightsError: a file that would be carried over is a symbolic link out of the folder.
        OutputError: ``modules.json`` is damaged.
    """
    modules = module_folders(folder / MODULES) if (folder / MODULES).is_file() else []
    carried, left = [], []
    for path in _files(folder):
        name = path.as_posix()
        if name in weights or name in _MADE_ANEW:
            continue
        inside = any(path.is_relative_to(module) for module in modules)
        if _belongs(path, code=code) or (inside and not path.name.startswith(".")):
            _check_link(folder, name)
            carried.append(name)
        else:
            left.append(name)
    return Belongings(tuple(carried), tuple(left))


def carry(source: Path, target: Path, files: tuple[str, ...]) -> None:
    """Copy files, contents only, into a folder that may hold some of them from an attempt before."""
    for name in files:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.draft")
        shutil.copyfile(source / name, draft)
        draft.replace(path)


def _files(folder: Path) -> Iterator[PurePosixPath]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            yield PurePosixPath(Path(root, name).relative_to(folder).as_posix())


def _belongs(path: PurePosixPath, *, code: bool) -> bool:
    """A tokenizer, processor, template or licence at the top of the folder."""
    name = path.name.lower()
    if len(path.parts) > 1 or name.startswith("."):
        return name.endswith(".jinja") and path.parts[0] == "additional_chat_templates"
    if name.split(".")[0].replace("-", "_").startswith(_LICENCES):
        return True
    if name in _STATES or name.endswith(".index.json") or name == _CARD.lower():
        return False
    return name.endswith(_TEXTS) or (code and name.endswith(".py"))


def _check_link(folder: Path, name: str) -> None:
    """A link may lead anywhere inside its folder, or from a snapshot of the Hub's cache to that cache's blobs."""
    real, root = (folder / name).resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs"
    if real.is_relative_to(root) or (root.parent.name == "snapshots" and real.is_relative_to(blobs)):
        return
    raise WeightsError(
        f"{name} is a symbolic link that leads out of its folder, and would be copied into the variant; put the file "
        "itself there, or remove the link"
    )
