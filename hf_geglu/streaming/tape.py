"""What the layers returned, kept on disk: to hand it out again, in this process or in one that goes on after it.

One file for each stretch of calls of one batch that was run in one go. A file appears when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from hf_geglu.files.whole import write_whole
from hf_geglu.streaming.nested import Nested, rebuilt, shape_of, tensors_in


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a unit."""

    unit: str
    """Its path."""
    returned: Nested


class Tape:
    """The calls of each batch in order, with what they returned.

    Args:
        folder: to write to; what is there is taken up.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._calls: dict[int, list[tuple[str, Path, int]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self._note(path)

    def _note(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            units = json.loads(file.metadata()["units"])
        calls = self._calls.setdefault(int(path.stem.split("-")[0]), [])
        calls += [(unit, path, number) for number, unit in enumerate(units)]

    def units(self, batch: int) -> list[str]:
        """Paths of the units that were called, in order."""
        return [unit for unit, _, _ in self._calls.get(batch, ())]

    def append(self, batch: int, calls: Sequence[Call]) -> None:
        """Keep what further calls of a batch returned."""
        if not calls:
            return
        held: dict[str, torch.Tensor] = {}
        for number, call in enumerate(calls):
            for place, tensor in enumerate(tensors_in(call.returned)):
                held[f"{number}.{place}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
        told = {
            "units": json.dumps([call.unit for call in calls]),
            "shapes": json.dumps([shape_of(call.returned) for call in calls]),
        }
        path = self._folder / f"{batch:06}-{len(self._calls.get(batch, ())):06}.safetensors"
        write_whole(path, held, told)
        self._note(path)

    def returned(self, batch: int, call: int) -> Nested:
        """What a call returned. Mapped, so that only what is looked at is read; writing to it changes no file."""
        _, path, number = self._calls[batch][call]
        with safe_open(path, framework="pt") as file:
            shape = json.loads(file.metadata()["shapes"])[number]
            prefix = f"{number}."
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - safe_open is no mapping
            ordered = sorted(names, key=lambda name: int(name.removeprefix(prefix)))
            return rebuilt(shape, [file.get_tensor(name) for name in ordered])
