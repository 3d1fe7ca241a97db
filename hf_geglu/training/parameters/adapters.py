"""LoRA for the time of a training (Hu 2021, arXiv:2106.09685): adapters go on before it and into the weights after it.

What is saved is therefore an ordinary model. `hf-geglu shrink` makes it small again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_geglu.errors import ConfigurationError
from hf_geglu.training.settings.run import TrainSettings

MARK = "lora_"
"""What PEFT's names of adapter parameters begin with, after the path of their layer."""


@contextmanager
def adapted(model: nn.Module, settings: TrainSettings) -> Iterator[None]:
    """With `settings.trainable` "lora": LoRA adapters on `model`, in place, that are merged when the block ends well
    and taken off when it does not. Otherwise nothing.

    Raises:
        ConfigurationError: PEFT is not installed, or finds no layer to put them on.
    """
    if settings.trainable != "lora":
        yield
        return
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ConfigurationError("--train lora needs PEFT: pip install peft, or train all, ffn or value.") from error
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config: Any = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules or "all-linear",
    )
    torch.manual_seed(settings.seed)  # the adapters begin at random
    try:
        with warnings.catch_warnings():  # PEFT finds out by itself which way a layer's matrix lies, and says so
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            tuner: Any = LoraModel(model, {"default": config}, "default")
    except ValueError as error:
        raise ConfigurationError(
            f"--lora_target_modules {' '.join(settings.lora_target_modules or ['all-linear'])}: "
            f"{str(error).splitlines()[0]} Expected names of linear layers of {type(model).__name__}."
        ) from error
    finish = tuner.unload
    try:
        yield
        finish = tuner.merge_and_unload
    finally:
        finish()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
