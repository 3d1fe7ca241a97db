"""What sentence-transformers keeps beside a model: which modules run after it, and their configs and weights.

Its layout (sentence-transformers, "Creating Custom Models", "Structure of Sentence Transformer Models"):
``modules.json`` lists the modules with a folder each, the transformer's being the root;
``config_sentence_transformers.json`` has prompts and the similarity, ``sentence_bert_config.json`` the longest input.
A conversion changes none of them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from hf_geglu.errors import OutputError

MODULES = "modules.json"
_SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")


def carry_companions(source: str | os.PathLike[str], target: Path, *, revision: str | None = None) -> tuple[str, ...]:
    """Copy them from a model's folder or repository; nothing happens where it is no sentence-transformers model.

    Files that `target` has already are left alone.

    Args:
        source: folder or Hub id of the model that was converted.
        target: an existing folder.
        revision: branch, tag or commit on the Hub.

    Returns:
        What was copied, as paths relative to the folder.

    Raises:
        OutputError: ``modules.json`` is damaged or names a folder outside of its own.
    """
    folder = Path(source) if os.path.isdir(source) else _downloaded(str(source), revision, [MODULES, *_SETTINGS])
    if folder is None or not (folder / MODULES).is_file():
        return ()
    parts = module_folders(folder / MODULES)
    if not os.path.isdir(source):
        folder = _downloaded(str(source), revision, [f"{part}/*" for part in parts]) or folder
    found = [folder / MODULES, *(path for pattern in _SETTINGS for path in folder.glob(pattern))]
    found += [path for part in parts for path in (folder / part).rglob("*") if path.is_file()]
    copied = []
    for path in sorted(found):
        name = path.relative_to(folder)
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
            copied.append(name.as_posix())
    return tuple(copied)


def module_folders(modules: Path) -> list[str]:
    """The folders of the modules after the transformer, as ``modules.json`` lists them.

    Raises:
        OutputError: it is damaged or names a folder outside of its own.
    """
    try:
        listed: list[Any] = json.loads(modules.read_text(encoding="utf-8"))
        parts = [str(entry["path"]) for entry in listed if entry["path"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{MODULES} of the model that was converted is damaged ({error!r}); expected a list of modules with a path "
            "each, as sentence-transformers writes it"
        ) from error
    for part in parts:
        if PurePosixPath(part).is_absolute() or ".." in PurePosixPath(part).parts:
            raise OutputError(f"{MODULES} names {part!r}, which is outside of its folder; expected a folder beside it")
    return parts


def _downloaded(repository: str, revision: str | None, patterns: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None  # the model itself was loaded before: its repository has no such files at hand
