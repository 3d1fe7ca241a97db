"""Is a local checkpoint all there? Checked before it is loaded, so that the answer is a sentence and not a stack
trace."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from hf_geglu.errors import WeightsError

INDEX = "model.safetensors.index.json"


def check_weights(folder: Path) -> None:
    """Every safetensors file that a folder needs is there in full length.

    Reads headers only. Folders without safetensors are left to transformers, which says what it looked for.

    Raises:
        WeightsError: names the file that is missing or truncated.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise WeightsError(f"{INDEX} is damaged ({error!r}); download the checkpoint again") from error
        for name in names:
            if not (folder / name).is_file():
                raise WeightsError(f"{INDEX} lists {name}, which is not there; download the checkpoint again")
    else:
        names = [path.name for path in sorted(folder.glob("model*.safetensors"))]
    for name in names:
        _check_length(folder / name)


def _check_length(path: Path) -> None:
    """A safetensors file is 8 bytes of header length, a JSON header, and exactly the bytes that the header lists
    (safetensors, "Format")."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or 8 + length > size:
            raise WeightsError(f"{path.name} is truncated inside its header; download it again")
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"the header of {path.name} is damaged ({error!r}); download it again") from error
    if 8 + length + end != size:
        raise WeightsError(
            f"{path.name} has {size:,} bytes, its header promises {8 + length + end:,}; it is truncated or damaged, "
            "download it again"
        )
