"""How several processes train one model: whole copies (DDP) or shares (FSDP2). What else accelerate offers is refused
here, before anything is loaded, with the reason."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch

from hf_geglu.errors import ConfigurationError

Strategy = Literal["one", "copies", "shares", "zero"]

_KNOWN: dict[str, Strategy] = {
    "NO": "one",
    "MULTI_CPU": "copies",
    "MULTI_GPU": "copies",
    "FSDP": "shares",
    "DEEPSPEED": "zero",
}


def launched() -> int:
    """How many processes this one was launched with, itself included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def stay_on_cpu(use_cpu: bool) -> bool:
    """Whether to tell accelerate that this is a CPU run: on a machine without a GPU several processes would otherwise
    not know of each other, and each train the model for itself.

    Raises:
        ConfigurationError: DeepSpeed, on the CPU of a machine that has a GPU.
    """
    if asks_for("DEEPSPEED"):  # told so, accelerate would train copies without a word
        if use_cpu and torch.accelerator.is_available():
            raise ConfigurationError(
                "--use_cpu with DeepSpeed on a machine that has a GPU: expected one or the other, since DeepSpeed uses "
                "it. Leave --use_cpu out, or launch with scripts/accelerate/fsdp2_cpu.yaml."
            )
        return False
    return use_cpu or (launched() > 1 and not torch.accelerator.is_available())


def asks_for(strategy: str) -> bool:
    """Whether this process was launched with FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{strategy}", "false").lower() == "true"


def settle_strategy(accelerator: Any) -> Strategy:
    """Which of the strategies this accelerator follows. On a CPU it is told to shard, if it was launched to.

    Raises:
        ConfigurationError: a strategy, or an option of one, that this training does not support.
    """
    if asks_for("DEEPSPEED"):
        _know_each_other(accelerator)
    if accelerator.num_processes != launched() and launched() > 1:
        raise ConfigurationError(
            f"{launched()} processes were launched, but accelerate sees {accelerator.num_processes}: expected all of "
            "them to train together. Check `accelerate launch --config_file`; scripts/accelerate has files that work."
        )
    name = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if asks_for("FSDP") and name == "MULTI_CPU":
        _shard_on_cpu(accelerator)
        name = "FSDP"
    strategy = _KNOWN.get(name)
    if strategy is None:
        raise ConfigurationError(
            f"distributed strategy {name}: expected one process, several with whole copies of the model (DDP), or with "
            f"shares of it (FSDP2). {_REASONS.get(name, 'No other was ever tried.')} Launch with --config_file "
            "scripts/accelerate/fsdp2.yaml, which saves the same memory, or ddp.yaml."
        )
    if strategy == "shares":
        _check_sharding(accelerator)
    if strategy == "zero":
        _check_zero(accelerator)
    return strategy


_REASONS = {
    "MEGATRON_LM": "Megatron-LM brings model classes of its own, which have no GeGLU variants.",
}


def _shard_on_cpu(accelerator: Any) -> None:
    """accelerate shards on GPUs only, and would copy without a word; told so, it takes the same way on a CPU."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    for state in (AcceleratorState, PartialState):  # the first is filled from the second again and again
        state._shared_state["distributed_type"] = DistributedType.FSDP


def _know_each_other(accelerator: Any) -> None:
    """accelerate counts processes on GPUs only, though DeepSpeed has connected them on a CPU too."""
    from accelerate.state import AcceleratorState, PartialState

    if launched() > 1 and accelerator.num_processes == 1 and torch.distributed.is_initialized():
        for state in (AcceleratorState, PartialState):
            state._shared_state["num_processes"] = torch.distributed.get_world_size()
            state._shared_state["process_index"] = torch.distributed.get_rank()
            state._shared_state["local_process_index"] = int(os.environ.get("LOCAL_RANK", "0"))


def _check_zero(accelerator: Any) -> None:
    plugin: Any = accelerator.state.deepspeed_plugin
    config: Any = plugin.deepspeed_config
    zero: Any = config.get("zero_optimization", {})
    if plugin.zero_stage not in (1, 2):
        raise ConfigurationError(
            f"DeepSpeed with ZeRO stage {plugin.zero_stage}: expected 1 or 2. Stage 3 empties the weights between "
            "forwards, which kernels, averages and verification need. Launch with scripts/accelerate/fsdp2.yaml, which "
            "shares out the weights too, or write `zero_stage: 2`."
        )
    if accelerator.mixed_precision != "no":
        raise ConfigurationError(
            f"DeepSpeed with mixed precision {accelerator.mixed_precision}: expected none, since its engine would cast "
            "the weights that are evaluated and saved. Use float32, or launch with scripts/accelerate/fsdp2.yaml."
        )
    offloaded = [name for name in zero if name.startswith("offload") and zero[name].get("device", "none") != "none"]
    if offloaded or "optimizer" in config or "scheduler" in config:
        given = [*offloaded, *(name for name in ("optimizer", "scheduler") if name in config)]
        raise ConfigurationError(
            f"DeepSpeed with {' and '.join(given)}: expected neither offloading nor an optimizer or schedule of its "
            "own, since the recipe's flags say them. Take it out of the config file."
        )


def _check_sharding(accelerator: Any) -> None:
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    plugin: Any = accelerator.state.fsdp_plugin
    version = getattr(plugin, "fsdp_version", None)
    if version is None:
        raise _refused("an accelerate without FSDP2", "accelerate 1.6 or newer", "Upgrade it.")
    if version != 2:
        raise _refused(
            f"fsdp_version {version}",
            "2: version 1 flattens parameters, and layers, value branches and checkpoints are told apart by them",
            "Write `fsdp_version: 2` into the config file.",
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise _refused(
            f"mixed precision {accelerator.mixed_precision}",
            "bf16 or none: a gradient that overflows in one share must stop the step in all",
            "Use bf16.",
        )
    options = {
        "fsdp_cpu_ram_efficient_loading": (
            plugin.cpu_ram_efficient_loading,
            "every process needs the weights before they are shared, for the conversion and its verification",
        ),
        "fsdp_activation_checkpointing": (
            plugin.activation_checkpointing,
            "it renames the layers that checkpoints are about; --gradient_checkpointing does the same without",
        ),
        "fsdp_offload_params": (
            type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
            "weights that are moved back and forth were never tried with this loop",
        ),
        "fsdp_ignored_modules": (
            plugin.ignored_modules is not None,
            "the gradients of what is left out would differ between processes",
        ),
        "fsdp_auto_wrap_policy SIZE_BASED_WRAP": (
            plugin.auto_wrap_policy is size_based_auto_wrap_policy,
            "layers are shared out by their class",
        ),
        "parallelism_config": (
            getattr(accelerator, "parallelism_config", None) is not None,
            "tensor and context parallelism split a batch or a layer, of which this loop counts the tokens",
        ),
        "dynamo_backend": (
            str(accelerator.state.dynamo_plugin.backend.value) != "NO",
            "a compiled model hides the output projection and the blocks that --ops runs by kernels",
        ),
    }
    for name, (on, reason) in options.items():
        if on:
            raise _refused(name, f"it off, since {reason}", "Take it out of the config file.")


def _refused(given: str, expected: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(f"FSDP with {given}: expected {expected}. {remedy}")
