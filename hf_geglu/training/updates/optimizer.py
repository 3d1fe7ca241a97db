"""AdamW and its schedule, and their state as plain data: names, numbers and tensors, never a pickle."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from hf_geglu.errors import ConfigurationError, TrainingError
from hf_geglu.training.processes.sharding import joined, part_of, share
from hf_geglu.training.processes.tensor_file import Held, Source, part
from hf_geglu.training.settings.run import TrainSettings


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay pulls at this parameter: matrices yes, biases and norm scales no.

    The biases of 3-D experts have two dimensions, hence the look at the name.
    """
    return parameter.ndim >= 2 and not name.endswith("bias")


def layer_of(name: str) -> int | None:
    """The layer that a parameter belongs to: the first number in its name; None outside the layers."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def rate_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """What the learning rate of each parameter is multiplied by: ``decay`` to the number of layers above it.

    The last layer and all that comes after it have 1, the embeddings the smallest (ULMFiT, arXiv:1801.06146, section
    3.2; the form of ELECTRA and BEiT).
    """
    names = [name for name, _ in model.named_parameters()]
    layers = [layer for name in names if (layer := layer_of(name)) is not None]
    depth = max(layers, default=-1) + 1
    seen_layers, factors = False, {}
    for name in names:
        layer = layer_of(name)
        seen_layers |= layer is not None
        above = depth - 1 - layer if layer is not None else 0 if seen_layers else depth
        factors[name] = decay**above
    return factors


def make_optimizer(model: nn.Module, settings: TrainSettings, *, values: Mapping[str, Tensor] | None = None) -> AdamW:
    """AdamW over the trainable parameters of `model`: matrices decay, biases and norms do not.

    Args:
        model: with what is not to be trained frozen.
        settings: learning rates, decays, moments.
        values: masks of the value branches of packed parameters (see `trainable`). With `settings.trainable` "value"
            they do not decay.

    Raises:
        TrainingError: every parameter is frozen.
    """
    values = values or {}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise TrainingError("a model without trainable parameters: expected at least one. Unfreeze some.")
    factors = rate_factors(model, settings.layerwise_lr_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        decayed = decays(name, parameter) and not (settings.trainable == "value" and name in values)
        groups.setdefault((factors[name], decayed), []).append(parameter)
    return AdamW(
        [
            {
                "params": parameters,
                "weight_decay": settings.weight_decay if decayed else 0.0,
                "lr": settings.learning_rate * factor,
            }
            for (factor, decayed), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
        ],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=_fusable(p for _, p in trainable),
    )


def _fusable(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether torch has one kernel for the whole update: on a CPU it takes a fifth of the time of the loop over
    operations (134 million float32 weights, one thread: 0.05 s instead of 0.24 to 0.35), and no temporaries."""
    kinds = {parameter.device.type for parameter in parameters}
    return len(kinds) == 1 and kinds <= {"cpu", "cuda", "xpu"}


def scale_value_updates(
    model: nn.Module, optimizer: AdamW, settings: TrainSettings, values: Mapping[str, Tensor]
) -> None:
    """Give the value branches of packed parameters the learning rate of their own, if they have one: after each step,
    multiply what it changed where the masks are 1.

    Scaling a gradient would not do it: Adam divides it out again.

    Args:
        model: as it will be trained: sharded already, if it will be.
        optimizer: of its parameters.
        settings: with the learning rates.
        values: the masks, by name of the parameter.
    """
    if settings.value_learning_rate is None or not settings.learning_rate:
        return
    ratio = settings.value_learning_rate / settings.learning_rate
    before: dict[nn.Parameter, Tensor] = {}
    placed = {
        parameter: part_of(values[name], parameter).to(share(parameter))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name in values
    }

    def remember(*_: Any) -> None:
        before.update({parameter: share(parameter).clone() for parameter in placed})

    def scale(*_: Any) -> None:
        for parameter, mask in placed.items():
            share(parameter).lerp_(before.pop(parameter), mask * (1.0 - ratio))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(scale)


def make_scheduler(optimizer: AdamW, settings: TrainSettings, *, total_steps: int) -> LambdaLR:
    """The learning rate over `total_steps` optimizer steps.

    Raises:
        ConfigurationError: `lr_scheduler_kwargs` that the schedule does not take, or lacks.
    """
    from transformers import get_scheduler

    try:
        scheduler: LambdaLR = get_scheduler(
            settings.lr_scheduler_type,
            optimizer,
            num_warmup_steps=settings.warmup(total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=settings.scheduler_kwargs(),
        )
    except ConfigurationError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"lr_scheduler_type={settings.lr_scheduler_type} with lr_scheduler_kwargs={settings.lr_scheduler_kwargs}: "
            f"expected what that schedule takes ({error}). Correct --lr_scheduler_kwargs."
        ) from error
    return scheduler


def _named(model: nn.Module, optimizer: AdamW) -> Iterator[tuple[str, nn.Parameter]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[parameter], parameter


class AdamState:
    """AdamW's state by parameter name: `parameter name:state name`."""

    def __init__(self, model: nn.Module, optimizer: AdamW) -> None:
        """Of the parameters that `optimizer` has of `model`, which may be shared out."""
        self._optimizer = optimizer
        self._parameters = dict(_named(model, optimizer))

    def tensors(self) -> dict[str, Held]:
        """Wherever they are; empty before the first step."""
        return {
            f"{name}:{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    def load(self, tensors: Mapping[str, Source]) -> None:
        """Put back what `tensors` gave, or this process's share of it. A parameter that had no state yet still has
        none.

        Raises:
            TrainingError: state for other parameters, or of another shape, than this model has.
        """
        check_optimizer_tensors(self._parameters, tensors)
        state: dict[Tensor, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, state_name = key.rpartition(":")
            parameter = self._parameters[name]
            # AdamW keeps its step count on the CPU unless it is fused.
            fused = self._optimizer.defaults.get("fused")
            place = parameter.device if value.shape or fused else torch.device("cpu")
            own = part(value, parameter).to(place, copy=True)  # what is read may lie in a file that goes away
            state.setdefault(parameter, {})[state_name] = joined(own, parameter) if value.shape else own
        self._optimizer.state.clear()
        self._optimizer.state.update(state)


def check_optimizer_tensors(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Source]) -> None:
    """Refuse the state of another model.

    Raises:
        TrainingError: state for other parameters, or of another shape, than this model has.
    """
    foreign = sorted({key.rpartition(":")[0] for key in tensors} - parameters.keys())
    if foreign:
        raise TrainingError(
            f"optimizer state for {foreign[0]} and {len(foreign) - 1} more parameters that this model does not train: "
            "expected the state of the same model. Give the model, --convert, --variant and --layers that the "
            "checkpoint was made with."
        )
    for key, value in tensors.items():
        name = key.rpartition(":")[0]
        parameter = parameters[name]
        if value.shape and value.shape != parameter.shape:
            raise TrainingError(
                f"optimizer state of {name} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}: "
                "expected the same model. Give the model, --convert, --variant and --layers that the checkpoint was "
                "made with."
            )


def scheduler_state(scheduler: LambdaLR) -> dict[str, Any]:
    """How far the schedule is; the rest follows from the settings."""
    return {"last_epoch": scheduler.last_epoch, "step_count": scheduler._step_count}


def load_scheduler_state(scheduler: LambdaLR, state: dict[str, Any]) -> None:
    """Move a fresh schedule to where a saved one was; rates are computed anew, so a longer run takes its own."""
    scheduler.last_epoch = int(state["last_epoch"])
    scheduler._step_count = int(state["step_count"])
    rates = [base * fn(scheduler.last_epoch) for base, fn in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
