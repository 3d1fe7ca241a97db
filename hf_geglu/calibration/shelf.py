"""What a calibration has found so far, on disk, so that one that was killed goes on and finds the same.

A folder that belongs to one calibration of one model. Each file in it is there completely or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_geglu.conversions import Coefficients
from hf_geglu.errors import DataError
from hf_geglu.files.whole import write_whole

_KEY = "calibration.json"


class Shelf:
    """Named sets of tensors.

    Args:
        folder: is made where it is not there.
        key: what tells this calibration from others; plain JSON.

    Raises:
        DataError: the folder belongs to another calibration.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path, text = folder / _KEY, json.dumps(dict(key), sort_keys=True, default=str)
        if path.exists():
            told = path.read_text(encoding="utf-8")
            if told != text:
                raise DataError(
                    f"{folder.name} belongs to another calibration: other {_different(told, text)}. Delete it to begin "
                    "anew, or name another folder"
                )
        else:
            draft = path.with_suffix(".draft")
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)

    @classmethod
    def anew(cls, folder: Path, key: Mapping[str, Any]) -> Shelf:
        """The same, but what belongs to another calibration is removed."""
        try:
            return cls(folder, key)
        except DataError:
            shutil.rmtree(folder)
            return cls(folder, key)

    def path(self, name: str) -> Path:
        """Where that file is, or will be."""
        return self.folder / f"{name}.safetensors"

    def drop(self, name: str) -> None:
        """Remove a file or folder that is needed no more."""
        self.path(name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def keep_only(self, name: str) -> None:
        """Remove everything but that file."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path not in (self.path(name), self.folder / _KEY):
                path.unlink()

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], told: Any = None) -> None:
        """Keep tensors, and what plain JSON says of them."""
        write_whole(self.path(name), tensors, {"told": json.dumps(told)})

    def read(self, name: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        """What `write` kept under that name; None where it has not come to that.

        Raises:
            DataError: the file is damaged.
        """
        path = self.path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads((file.metadata() or {})["told"])
                return {key: file.get_tensor(key).clone() for key in file.keys()}, told  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path.name} in {self.folder.name} is damaged ({error}); delete the folder") from error

    def write_lines(self, name: str, lines: Mapping[str, Mapping[str, Coefficients]], told: Any = None) -> None:
        """Keep candidates of sites: `up` -> name -> line."""
        held = {
            f"{site}|{method}|{field}": tensor.cpu()
            for site, candidates in lines.items()
            for method, line in candidates.items()
            for field, tensor in line.tensors().items()
        }
        self.write(name, held, told)

    def read_lines(self, name: str) -> tuple[dict[str, dict[str, Coefficients]], Any] | None:
        """What `write_lines` kept."""
        found = self.read(name)
        if found is None:
            return None
        parts: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
        for key, tensor in found[0].items():
            site, method, field = key.rsplit("|", 2)
            parts.setdefault(site, {}).setdefault(method, {})[field] = tensor
        lines = {
            site: {method: Coefficients.from_tensors(tensors) for method, tensors in methods.items()}
            for site, methods in parts.items()
        }
        return lines, found[1]


def _different(told: str, text: str) -> str:
    try:
        before, now = json.loads(told), json.loads(text)
        return ", ".join(name for name in now if before.get(name) != now[name]) or "settings"
    except (ValueError, AttributeError):
        return "settings"
