"""AdamW and its schedule, and their state as plain data: names, numbers and tensors, never a pickle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from hf_geglu.errors import ConfigurationError, TrainingError
from hf_geglu.training.settings import TrainSettings


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay pulls at this parameter: matrices yes, biases and norm scales no.

    The biases of 3-D experts have two dimensions, hence the look at the name.
    """
    return parameter.ndim >= 2 and not name.endswith("bias")


def make_optimizer(model: nn.Module, settings: TrainSettings) -> AdamW:
    """AdamW over the trainable parameters of `model`, in a group that decays and one that does not.

    Raises:
        TrainingError: every parameter is frozen.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise TrainingError("a model without trainable parameters: expected at least one. Unfreeze some.")
    decayed = [p for name, p in trainable if decays(name, p)]
    spared = [p for name, p in trainable if not decays(name, p)]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=all(p.is_cuda for _, p in trainable),
    )


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


def optimizer_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name:state name` -> tensor on the CPU."""
    return {
        f"{name}:{key}": value.detach().cpu().contiguous()
        for name, parameter in _named(model, optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: AdamW, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took out. A parameter that had no state yet still has none.

    Raises:
        TrainingError: state for other parameters, or of another shape, than this model has.
    """
    expected = dict(_named(model, optimizer))
    foreign = sorted({key.rpartition(":")[0] for key in tensors} - expected.keys())
    if foreign:
        raise TrainingError(
            f"optimizer state for {foreign[0]} and {len(foreign) - 1} more parameters that this model does not train: "
            "expected the state of the same model. Give the model, --convert, --variant and --layers that the "
            "checkpoint was made with."
        )
    state: dict[Tensor, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition(":")
        parameter = expected[name]
        if value.ndim and value.shape != parameter.shape:
            raise TrainingError(
                f"optimizer state of {name} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}: "
                "expected the same model. Give the model, --convert, --variant and --layers that the checkpoint was "
                "made with."
            )
        # AdamW keeps its step count on the CPU unless it is fused.
        place = parameter.device if value.ndim or optimizer.defaults.get("fused") else torch.device("cpu")
        state.setdefault(parameter, {})[part] = value.to(place)
    optimizer.state.clear()
    optimizer.state.update(state)


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
