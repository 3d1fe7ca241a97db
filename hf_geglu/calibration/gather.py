"""One pass of calibration data through a model: every site's statistics, in memory that does not grow with the data.

Deterministic: the same model, data and seed give the same bits. Resumable: with `state`, a pass that was killed goes on
at the batch after the last one that it wrote down, and ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_geglu.calibration.data import CalibrationData
from hf_geglu.calibration.seen import Seen, watching
from hf_geglu.distance import cast, outputs_of
from hf_geglu.errors import DataError
from hf_geglu.modes import evaluating
from hf_geglu.sites import Site

Progress = Callable[[int, int], None]
"""Takes how many batches are done, and of how many."""

SAVE_EVERY = 8
"""Batches between two writings of the state."""


class Statistic(Protocol):
    """What is gathered at a site: sums over tokens, as a rule."""

    def update(self, seen: Seen) -> None:
        """Take in one batch."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of its state, to be saved."""

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave."""


class Together:
    """Several statistics of one site, gathered in one pass."""

    def __init__(self, **parts: Statistic) -> None:
        self.parts = parts

    def update(self, seen: Seen) -> None:
        """Take in one batch."""
        for part in self.parts.values():
            part.update(seen)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of their states."""
        return {f"{name}.{key}": tensor for name, part in self.parts.items() for key, tensor in part.tensors().items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put them back."""
        for name, part in self.parts.items():
            part.load(
                {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            )


def gather(
    model: nn.Module,
    data: CalibrationData,
    statistics: Mapping[str, Statistic],
    *,
    sites: Sequence[Site],
    gradients: bool = False,
    seed: int = 0,
    state: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Run the model on all batches and update the statistics of every site, by its `up`.

    The model is run as it is, in its own dtype, on its own device, in eval mode, and left as it was.

    Args:
        model: converted or not.
        data: the batches.
        statistics: one for each of `sites`, updated in place.
        sites: which to watch.
        gradients: run backward too, from labels that are drawn from the model's own distribution: the square of such a
            gradient is what an error costs in KL divergence (the Fisher information; Amari 1998). A model without
            logits gets a random projection of its outputs instead.
        seed: of those draws.
        state: file that keeps the statistics of a pass under way.
        progress: called after every batch.

    Raises:
        DataError: `state` belongs to another calibration.
        SiteError: a site cannot be watched.
    """
    key = {"data": data.fingerprint, "sites": [site.up for site in sites], "gradients": gradients, "seed": seed}
    done = 0 if state is None else _resume(state, key, statistics)
    total = len(data.batches)
    quiet = _frozen(model) if gradients else torch.no_grad()

    def on_seen(seen: Seen) -> None:
        with torch.no_grad():
            statistics[seen.site.up].update(seen)

    with evaluating(model), quiet, watching(model, sites, on_seen, gradients=gradients) as told:
        for number, batch in enumerate(data.batches[done:], start=done):
            inputs = cast(batch, model)
            told(mask_of(inputs))
            with torch.enable_grad() if gradients else nullcontext():
                outputs = outputs_of(model, inputs)
                if gradients:
                    score(outputs, inputs.get("attention_mask"), drawing(seed, number)).backward()  # type: ignore[no-untyped-call]
            if state is not None and ((number + 1) % SAVE_EVERY == 0 or number + 1 == total):
                _save(state, key, number + 1, statistics)
            if progress is not None:
                progress(number + 1, total)


def mask_of(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """(B, T): which positions are tokens; None where all are."""
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def drawing(seed: int, batch: int) -> torch.Generator:
    """What draws the labels of a batch: the same in whatever order batches come."""
    return torch.Generator().manual_seed(seed * 1_000_003 + batch)


def score(outputs: Mapping[str, torch.Tensor], mask: Any, generator: torch.Generator) -> torch.Tensor:
    """Log-likelihood of labels drawn from the model's own distribution, summed over tokens; of other outputs a product
    with noise. In both cases the mean square of its gradient is a metric of the outputs pulled back to the site."""
    logits = outputs.get("logits")
    if logits is not None and logits.dim() == 3:
        log_p = torch.log_softmax(logits.float(), dim=-1).flatten(0, 1)
        # drawn on the CPU, so that the labels do not depend on the device
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
        picked = log_p.gather(1, drawn)[:, 0]
        if isinstance(mask, torch.Tensor) and mask.numel() == len(picked):
            picked = picked[mask.flatten().bool()]
        return picked.sum()
    total = torch.zeros(())
    for tensor in outputs.values():
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        total = total + (tensor * noise).float().sum().cpu()
    return total


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient: the sites' outputs do, and nothing before them."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _save(path: Path, key: Mapping[str, Any], done: int, statistics: Mapping[str, Statistic]) -> None:
    """Whole or not at all."""
    held = {
        f"{site}|{name}": tensor.contiguous()
        for site, statistic in statistics.items()
        for name, tensor in statistic.tensors().items()
    }
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(held, draft, metadata={"calibration": json.dumps(dict(key)), "done": str(done)})
    os.replace(draft, path)


def _resume(path: Path, key: Mapping[str, Any], statistics: Mapping[str, Statistic]) -> int:
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        told, done = json.loads(metadata["calibration"]), int(metadata["done"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            f"{path.name} is no state of a calibration ({error}); expected one that gather wrote. Delete it to begin "
            "anew, or name another file"
        ) from error
    if told != dict(key):
        different = ", ".join(name for name in key if told.get(name) != key[name])
        raise DataError(
            f"{path.name} belongs to another calibration: other {different}. Delete it to begin anew, or name another "
            "file"
        )
    for site, statistic in statistics.items():
        prefix = f"{site}|"
        statistic.load({name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)})
    return done
