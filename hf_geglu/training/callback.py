"""For transformers' Trainer and TRL's: what our own loop adds, as a callback.

Trainer(model=model, args=..., train_dataset=..., callbacks=[GegluCallback(trainable="value")])
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback

from hf_geglu.errors import ConfigurationError
from hf_geglu.inspecting.place import gate_rows, places, value_rows
from hf_geglu.training.parameters.trainable import Part, choose_trainable


class GegluCallback(TrainerCallback):  # type: ignore[misc]
    """Trains a part of the model only, and logs how far its value branches have come."""

    def __init__(self, trainable: Part = "all", *, log_values: bool = True) -> None:
        """For one Trainer.

        Args:
            trainable: as `--train`: "all", "ffn" or "value". In a packed projection the gate's half does not move.
            log_values: add "value_over_gate" to every log, the mean over blocks of ``|Wv| / |Wg|`` (Frobenius norms).
        """
        self._trainable, self._log_values = trainable, log_values
        self._open = ExitStack()

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Freeze the rest. The Trainer makes its optimizer after this, of what is not frozen.

        Raises:
            ConfigurationError: trainable="value" where the gate's half of a packed projection would move all the same.
        """
        if self._trainable == "value" and args.weight_decay:
            raise ConfigurationError(
                f"weight_decay={args.weight_decay:g} would pull at the gate's half of packed projections too: expected "
                "0 with trainable='value'. Set weight_decay=0, or use `hf-geglu finetune`, which spares them."
            )
        if self._trainable == "value" and (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
            raise ConfigurationError(
                "trainable='value' beside FSDP, whose shares drop the hooks that hold the gates still: expected "
                "one process or DDP, or `hf-geglu finetune --train value`, which holds them under FSDP2 too."
            )
        self._open.enter_context(choose_trainable(model, self._trainable).only(model))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What was frozen is as it was."""
        self._open.close()

    def on_log(self, args: Any, state: Any, control: Any, *, model: nn.Module, logs: dict[str, Any], **_: Any) -> None:
        """Beside the loss."""
        if not self._log_values or "loss" not in logs:
            return
        ratio = value_over_gate(model)
        if ratio is not None:
            logs["value_over_gate"] = ratio
            if state.log_history:
                state.log_history[-1]["value_over_gate"] = ratio


def value_over_gate(model: nn.Module) -> float | None:
    """Mean over the gated blocks of ``|Wv| / |Wg|``: 0 right after a GELU block was converted. None without any."""
    ratios = []
    for place in places(model):
        gate_FD, value_FD = gate_rows(model, place), value_rows(model, place)
        if gate_FD is not None and value_FD is not None:
            ratios.append(float(value_FD.norm() / gate_FD.norm().clamp_min(1e-30)))
    return sum(ratios) / len(ratios) if ratios else None
