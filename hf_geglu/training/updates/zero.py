"""DeepSpeed ZeRO, stages 1 and 2, through accelerate: every process has the weights, and a share of the optimizer's
state (1) and of the gradients (2).

The engine makes the step: it clips, and leaves the step out where a gradient is no number. Its state is read and
written by DeepSpeed's own functions for single parameters, so that checkpoints are as ever: no pickle, and any number
of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from hf_geglu.errors import ConfigurationError
from hf_geglu.training.processes.tensor_file import Held, Source, part
from hf_geglu.training.settings.run import TrainSettings
from hf_geglu.training.updates.optimizer import check_optimizer_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


def uses_zero(accelerator: Any) -> bool:
    """Whether DeepSpeed makes the steps."""
    return str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type)) == "DEEPSPEED"


def start_engine(model: nn.Module, optimizer: AdamW, accelerator: Any, settings: TrainSettings) -> ZeroStepping:
    """Hand model and optimizer over to an engine.

    Raises:
        ConfigurationError: settings that the engine has no place for.
    """
    if settings.value_learning_rate is not None:
        raise ConfigurationError(
            "--value_learning_rate with DeepSpeed: expected one rate a parameter, since its optimizer sees shares of "
            "parameters laid end to end. Leave it out, or launch with scripts/accelerate/fsdp2.yaml."
        )
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = settings.per_device_train_batch_size
    config["gradient_accumulation_steps"] = 1  # the loop says where a step ends
    config["gradient_clipping"] = settings.max_grad_norm
    config["train_batch_size"] = settings.per_device_train_batch_size * int(accelerator.num_processes)
    engine, _ = accelerator.prepare(model, optimizer)
    return ZeroStepping(engine)


class ZeroStepping:
    """By DeepSpeed's engine."""

    def __init__(self, engine: Any) -> None:
        """Of an engine that accelerate has made."""
        self.model: nn.Module = engine
        self._engine = engine

    @contextmanager
    def _accumulating(self) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def accumulating(self) -> AbstractContextManager[Any]:
        """The engine waits for more."""
        return self._accumulating()

    def backward(self, loss: Tensor) -> None:
        """Gradients go to the process that keeps them."""
        self._engine.backward(loss)

    def clip(self) -> float:
        """The engine updates the weights here, unless the norm is no number."""
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return math.inf if norm is None or float(norm) < 0 else float(norm)

    def update(self) -> bool:
        """Done already."""
        return True


@dataclass(frozen=True)
class _Moment:
    """AdamW's mean gradient or squared gradient of a parameter, of which this process holds some numbers or none."""

    parameter: Any
    name: str

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        shape: torch.Size = self.parameter.shape
        return shape

    @property
    def dtype(self) -> torch.dtype:
        """ZeRO keeps it so."""
        return torch.float32

    def whole(self) -> Tensor:
        """All of it, on the CPU; every process must ask at the same time."""
        full: Tensor = self.parameter.get_full_hp_param(self.name)
        return full.cpu()


class ZeroState:
    """The optimizer's state of an engine, as `AdamState` gives it of a plain optimizer."""

    def __init__(self, model: nn.Module, engine: Any) -> None:
        """Of the model that the engine trains."""
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._zero = engine.optimizer

    def tensors(self) -> dict[str, Held]:
        """By parameter and name; empty before the first step."""
        steps = [state["step"] for state in self._zero.optimizer.state.values() if "step" in state]
        if not steps:
            return {}
        self._link()
        found: dict[str, Held] = {}
        for name, parameter in self._parameters.items():
            found |= {f"{name}:{moment}": _Moment(parameter, moment) for moment in MOMENTS}
            found[f"{name}:step"] = torch.as_tensor(steps[0], dtype=torch.float32)
        return found

    def load(self, tensors: Mapping[str, Source]) -> None:
        """Go on from them, and from the weights that the model has now.

        Raises:
            TrainingError: they are of another model.
        """
        check_optimizer_tensors(self._parameters, tensors)
        inner = self._zero.optimizer
        for group in inner.param_groups:
            for flat in group["params"]:
                zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
                inner.state[flat] = {"step": torch.zeros((), device=flat.device), **zeros}
        self._link()
        for name, parameter in self._parameters.items():
            shared: Any = parameter
            shared.set_full_hp_param(parameter.detach().float())
            for moment in MOMENTS:
                shared.set_full_hp_param(part(tensors[f"{name}:{moment}"], parameter), moment)
        count = part(tensors[f"{next(iter(self._parameters))}:step"], torch.zeros(()))
        for state in inner.state.values():
            state["step"].copy_(count)

    def _link(self) -> None:
        """Let parameters know their state. DeepSpeed does it when the first group has stepped, and others not yet."""
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()
