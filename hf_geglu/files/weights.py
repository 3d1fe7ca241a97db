"""Which files of a folder hold its weights, and what each tensor in them is. Reads headers, no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_geglu.errors import WeightsError
from hf_geglu.files.header import Header, read_header, read_json

INDEX = "model.safetensors.index.json"

Format = Literal["safetensors", "torch"]

# the order in which transformers looks for them
_PLACES: tuple[tuple[str, Format, bool], ...] = (
    ("model.safetensors", "safetensors", False),
    (INDEX, "safetensors", True),
    ("pytorch_model.bin", "torch", False),
    ("pytorch_model.bin.index.json", "torch", True),
)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files that transformers would load from a folder."""

    folder: Path
    format: Format
    names: tuple[str, ...]
    index: Mapping[str, str] | None
    """Tensor -> file, where the checkpoint has an index."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where they are."""
        return tuple(self.folder / name for name in self.names)


def find_weights(folder: Path) -> WeightFiles | None:
    """The weights of a folder; None where it has none that transformers looks for.

    Raises:
        WeightsError: an index that is damaged, leads out of the folder, or lists a file that is not there.
    """
    for name, kind, indexed in _PLACES:
        if not (folder / name).is_file():
            continue
        if not indexed:
            return WeightFiles(folder, kind, (name,), None)
        index = _read_index(folder, name)
        return WeightFiles(folder, kind, tuple(sorted(set(index.values()))), index)
    return None


def _read_index(folder: Path, name: str) -> dict[str, str]:
    content: Any = read_json(folder / name)
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise WeightsError(
            f"{name} is damaged: it has no `weight_map` from tensors to files; download the checkpoint again"
        )
    for file in sorted(set(index.values())):
        if not file or file in (".", "..") or any(character in file for character in "/\\:\0"):
            raise WeightsError(
                f"{name} lists {file[:80]!r}, which leads out of the folder; expected names of files beside it. Do not "
                "use this checkpoint unless you know who wrote it"
            )
        if not (folder / file).is_file():
            raise WeightsError(f"{name} lists {file}, which is not there; download the checkpoint again")
    return index


def read_headers(weights: WeightFiles) -> dict[str, Header]:
    """The header of each safetensors file, by file name, checked against each other and against the index.

    Raises:
        WeightsError: a file is damaged, a tensor occurs in two files, or index and files disagree.
    """
    headers = {name: read_header(weights.folder / name) for name in weights.names}
    places: dict[str, str] = {}
    for file, header in headers.items():
        for entry in header.entries:
            check_place(weights, places, entry.name, file)
    check_complete(weights, places)
    return headers


def check_place(weights: WeightFiles, places: dict[str, str], tensor: str, file: str) -> None:
    """Note that `file` holds `tensor`. Raises WeightsError where another one does, or the index says otherwise."""
    if tensor in places:
        raise WeightsError(f"{tensor} is in {places[tensor]} and in {file}; download the checkpoint again")
    said = file if weights.index is None else weights.index.get(tensor, file)
    if said != file:
        raise WeightsError(f"{file} holds {tensor}, which the index places in {said}; download the checkpoint again")
    places[tensor] = file


def check_complete(weights: WeightFiles, places: Mapping[str, str]) -> None:
    """Raises WeightsError where the index lists a tensor that no file holds."""
    absent = [name for name in weights.index or () if name not in places]
    if absent:
        raise WeightsError(
            f"the index places {absent[0]} in {weights.index[absent[0]]}, which does not hold it"  # type: ignore[index]
            f"{f' (nor {len(absent) - 1} others)' if len(absent) > 1 else ''}; download the checkpoint again"
        )


def check_weights(folder: Path) -> None:
    """Every safetensors file that a folder needs is there in full length and is what its index says.

    Reads headers only. Folders without safetensors are left to transformers, which says what it looked for.

    Raises:
        WeightsError: names the file that is missing, truncated or damaged.
    """
    weights = find_weights(folder)
    if weights is not None and weights.format == "safetensors":
        read_headers(weights)
