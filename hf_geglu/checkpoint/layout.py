"""The plan of the files to write: which tensor lies where, where its bytes come from and what happens to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from hf_geglu.checkpoint.stored import Stored
from hf_geglu.errors import PlanError
from hf_geglu.files.header import Entry, header_bytes, nbytes, rank


@dataclass(frozen=True, slots=True)
class Change:
    """A pure function on a tensor, and how it may be applied piece by piece (see `conversions.Rewrite`)."""

    function: Callable[[torch.Tensor], torch.Tensor]
    dim: int | None
    """The dimension that `function` mixes or lengthens, None where it is elementwise."""
    rows: Callable[[int, int], Callable[[torch.Tensor], torch.Tensor]] | None = None
    """The function of some rows by themselves, where each has numbers of its own."""

    def of_rows(self, start: int, stop: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes rows `start` to `stop`."""
        return self.function if self.rows is None else self.rows(start, stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: Stored
    """Where it comes from. A bias that only the converted block has comes from zeros, and lies beside the weight."""
    cast: torch.dtype
    """The dtype that `source` is loaded in, before `change`."""
    change: Change | None = None

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of its source."""
        return self.change is None and self.cast == self.source.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to write."""

    name: str
    outputs: tuple[Output, ...]
    """In the order of their bytes."""
    entries: tuple[Entry, ...]
    head: bytes = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.head) + (self.entries[-1].end if self.entries else 0)


def shards(outputs: Sequence[Output], max_shard_size: int | str) -> tuple[Shard, ...]:
    """Divide tensors into files, exactly as `save_pretrained` does.

    Args:
        outputs: in the order in which the model has them.
        max_shard_size: largest file, in bytes or as "5GB". A tensor that is larger gets a file of its own.

    Raises:
        PlanError: that is no size.
    """
    named = {output.name: output for output in outputs}
    ghosts = {name: torch.empty(output.shape, dtype=output.dtype, device="meta") for name, output in named.items()}
    try:
        split = split_torch_state_dict_into_shards(
            ghosts, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise PlanError(f"max_shard_size={max_shard_size!r}; expected a number of bytes, or one as '5GB'") from error
    return tuple(_shard(file, [named[name] for name in names]) for file, names in split.filename_to_tensors.items())


def index_json(written: Sequence[Shard], parameters: int) -> str | None:
    """The text of the index, as transformers writes it; None for a single file."""
    if len(written) == 1:
        return None
    size = sum(output.nbytes for shard in written for output in shard.outputs)
    content = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": {output.name: shard.name for shard in written for output in shard.outputs},
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _shard(name: str, group: Iterable[Output]) -> Shard:
    ordered = sorted(group, key=lambda output: (rank(output.dtype), output.name))
    entries = []
    end = 0
    for output in ordered:
        entries.append(Entry(output.name, output.dtype, output.shape, end, end + output.nbytes))
        end += output.nbytes
    return Shard(name, tuple(ordered), tuple(entries), header_bytes(entries, {"format": "pt"}))
