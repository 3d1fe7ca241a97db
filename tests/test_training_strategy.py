"""Which ways of sharing the work are taken, and what is said of the others before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import bert, gpt2, one_thread  # noqa: F401
from torch import nn

pytest.importorskip("accelerate")

from hf_geglu.errors import ConfigurationError
from hf_geglu.training import TrainSettings
from hf_geglu.training.processes.accelerator import make_accelerator
from hf_geglu.training.processes.sharded_model import _layers, _ties, share_out
from hf_geglu.training.processes.strategy import settle_strategy, stay_on_cpu

PLUGIN = {
    "fsdp_version": 2,
    "cpu_ram_efficient_loading": False,
    "activation_checkpointing": False,
    "cpu_offload": None,
    "ignored_modules": None,
    "auto_wrap_policy": len,
    "transformer_cls_names_to_wrap": None,
}


def accelerator(strategy: str, *, precision: str = "no", backend: str = "NO", **plugin: Any) -> Any:
    """As accelerate would have made it on a machine with GPUs."""
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=strategy),
        num_processes=1,
        mixed_precision=precision,
        parallelism_config=None,
        state=SimpleNamespace(
            fsdp_plugin=SimpleNamespace(**{**PLUGIN, **plugin}),
            dynamo_plugin=SimpleNamespace(backend=SimpleNamespace(value=backend)),
        ),
    )


@pytest.mark.parametrize(
    ("stage", "precision", "config", "message"),
    [
        (3, "no", {}, "ZeRO stage 3: expected 1 or 2.*fsdp2.yaml"),
        (2, "bf16", {}, "mixed precision bf16.*cast the weights"),
        (2, "no", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "DeepSpeed with offload_optimizer"),
        (1, "no", {"optimizer": {}, "scheduler": {}}, "DeepSpeed with optimizer and scheduler.*the recipe's flags"),
    ],
)
def test_what_deepspeed_is_refused(stage: int, precision: str, config: dict[str, Any], message: str) -> None:
    given = accelerator("DEEPSPEED", precision=precision)
    given.state.deepspeed_plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
    with pytest.raises(ConfigurationError, match=message):
        settle_strategy(given)
    given.mixed_precision = "no"
    given.state.deepspeed_plugin = SimpleNamespace(zero_stage=2, deepspeed_config={"zero_optimization": {"stage": 2}})
    assert settle_strategy(given) == "zero"


@pytest.mark.parametrize(
    ("strategy", "found"), [("NO", "one"), ("MULTI_CPU", "copies"), ("MULTI_GPU", "copies"), ("FSDP", "shares")]
)
def test_what_is_supported(strategy: str, found: str) -> None:
    assert settle_strategy(accelerator(strategy)) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategy": "MEGATRON_LM"}, "strategy MEGATRON_LM.*model classes of its own"),
        ({"strategy": "XLA"}, "strategy XLA.*No other was ever tried"),
        ({"fsdp_version": 1}, "fsdp_version 1.*flattens.*`fsdp_version: 2`"),
        ({"precision": "fp16"}, "mixed precision fp16.*Use bf16"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading.*the conversion"),
        ({"activation_checkpointing": True}, "activation_checkpointing.*--gradient_checkpointing"),
        ({"cpu_offload": type("CPUOffloadPolicy", (), {})()}, "offload_params.*never tried"),
        ({"ignored_modules": "lm_head"}, "ignored_modules.*differ between processes"),
        ({"backend": "INDUCTOR"}, "dynamo_backend.*hides the output projection"),
    ],
)
def test_what_is_refused_and_why(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        settle_strategy(accelerator(**{"strategy": "FSDP", **given}))


def test_layers_of_other_sizes_are_refused() -> None:
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    with pytest.raises(ConfigurationError, match=r"SIZE_BASED_WRAP.*by their class"):
        settle_strategy(accelerator("FSDP", auto_wrap_policy=size_based_auto_wrap_policy))


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train the model for itself, into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match=r"2 processes were launched.*accelerate sees 1.*scripts/accelerate"):
        settle_strategy(accelerator("NO"))
    assert stay_on_cpu(False) == (not torch.accelerator.is_available())


def test_one_process_has_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert make_accelerator(TrainSettings(use_cpu=True)).distributed_type.value == "NO"


def layers(model: nn.Module, **plugin: Any) -> set[str]:
    return {type(module).__name__ for module in _layers(model, SimpleNamespace(**{**PLUGIN, **plugin}), _ties(model))}


def test_layers_are_shared_out_one_by_one_without_tearing_what_is_tied() -> None:
    assert layers(gpt2()) == {"GPT2Block"}
    model = bert()
    model._no_split_modules = ["BertEmbeddings", "BertLayer", "BertOfAnotherHead"]
    assert layers(model) == {"BertLayer"}  # the embeddings are tied to the head
    assert layers(model, auto_wrap_policy=None) == set()
    assert layers(model, transformer_cls_names_to_wrap=["BertSelfOutput"]) == {"BertSelfOutput"}
    with pytest.raises(ConfigurationError, match="no layer of the class LlamaDecoderLayer"):
        layers(model, transformer_cls_names_to_wrap=["LlamaDecoderLayer"])
    with pytest.raises(ConfigurationError, match=r"one parameter, and BertEmbeddings holds only a part"):
        layers(model, transformer_cls_names_to_wrap=["BertEmbeddings"])


def test_a_single_number_cannot_be_shared_out() -> None:
    model = nn.Linear(2, 2)
    model.register_parameter("logit_scale", nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(ConfigurationError, match=r"logit_scale is a single number.*ddp\.yaml"):
        share_out(model, accelerator("FSDP"))
