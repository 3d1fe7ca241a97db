"""An exponential moving average of the trained weights (Polyak & Juditsky 1992; the warm-up is TensorFlow's).

    average <- d average + (1 - d) weights,    d = min(decay, (1 + step) / (10 + step))

The average is kept in float32 whatever the weights are in, because 1 - d is smaller than the rounding of 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_geglu.errors import TrainingError
from hf_geglu.training.processes.sharding import held, share
from hf_geglu.training.processes.tensor_file import Held, Source, part


class WeightAverage:
    """The average of a model's trainable parameters, as float32 copies on their device.

    Of a sharded model each process averages its own shares.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts at the weights as they are."""
        self._decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: share(p).float().clone() for name, p in self._parameters.items()}

    def update(self, step: int) -> None:
        """Take in the weights after that step (from 1)."""
        weight = 1.0 - min(self._decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._average[name].lerp_(share(parameter).float(), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside the block, and its own again afterwards, bit for bit."""
        own = {name: share(parameter).clone() for name, parameter in self._parameters.items()}
        try:
            self.give()
            yield
        finally:
            self._put(own)

    def give(self) -> None:
        """Leave the averaged weights in the model."""
        self._put(self._average)

    def tensors(self) -> dict[str, Held]:
        """For a checkpoint."""
        return {name: held(value, self._parameters[name]) for name, value in self._average.items()}

    def load(self, tensors: Mapping[str, Source]) -> None:
        """Go on from `tensors()`.

        Raises:
            TrainingError: of another model.
        """
        if tensors.keys() != self._average.keys():
            raise TrainingError(
                "the averaged weights of the checkpoint are of other parameters: expected the same model, and the same "
                "--train. Give them as then."
            )
        for name, parameter in self._parameters.items():
            self._average[name].copy_(part(tensors[name], parameter))

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            share(self._parameters[name]).copy_(value)
