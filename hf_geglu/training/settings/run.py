"""Every setting of a run as frozen dataclasses; each field carries the help text that the command line prints.

`TrainSettings` is all that `train` needs. The other three say where model and text come from and where the result goes.
Names and meanings follow transformers' TrainingArguments and example scripts, and TRL where those have none.
"""

# ruff: noqa: RUF009 - _flag is dataclasses.field with less to write
from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from hf_geglu.errors import ConfigurationError
from hf_geglu.training.settings.data import DataSettings
from hf_geglu.training.settings.flags import flag as _flag
from hf_geglu.training.settings.flags import require as _require

SchedulerName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
LATEST = "latest"
_WRITE = ("clm", "sft", "seq2seq")

__all__ = ["LATEST", "DataSettings", "ModelSettings", "OutputSettings", "RunSettings", "SchedulerName", "TrainSettings"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train: all that `train` needs besides a model and blocks.

    Raises:
        ConfigurationError: a value out of its range, or two settings that exclude each other.
    """

    _argument_group_name = "training"

    max_steps: int = _flag(-1, "number of optimizer steps; overrides --num_train_epochs", unit="steps", off="-1")
    num_train_epochs: float = _flag(3.0, "passes over the training blocks", unit="epochs")
    per_device_train_batch_size: int = _flag(8, "blocks a forward, per process", unit="blocks", aliases=("batch_size",))
    per_device_eval_batch_size: int = _flag(8, "blocks a forward while evaluating, per process", unit="blocks")
    gradient_accumulation_steps: int = _flag(
        1, "forwards per optimizer step; weighted by tokens, so 1x8 equals 8x1", unit="forwards", off="1"
    )
    learning_rate: float = _flag(5e-5, "peak learning rate of AdamW")
    weight_decay: float = _flag(0.0, "decoupled weight decay on matrices (never on biases and norms)", off="0")
    trainable: Literal["all", "ffn", "value", "lora"] = _flag(
        "all", "what is trained: all, ffn (blocks), value (branches alone) or lora (adapters)", aliases=("train",)
    )
    lora_r: int = _flag(16, "rank of the adapters of --train lora")
    lora_alpha: int = _flag(32, "their scale is lora_alpha / lora_r")
    lora_dropout: float = _flag(0.0, "dropout before them", off="0")
    lora_target_modules: list[str] | None = _flag(None, "names of the layers that get one; default: all linear ones")
    value_learning_rate: float | None = _flag(None, "peak learning rate of the value half of packed projections")
    layerwise_lr_decay: float = _flag(
        1.0, "learning rate of each layer over that of the layer above it", unit="0..1", off="1"
    )
    lr_scheduler_type: SchedulerName = _flag("linear", "shape of the learning rate over the run")
    lr_scheduler_kwargs: str | None = _flag(None, "more for the schedule, as JSON: '{\"min_lr\": 1e-6}'")
    warmup_steps: float = _flag(0.0, "steps of linear warm-up; below 1 a share of all steps", unit="steps", off="0")
    warmup_ratio: float = _flag(0.0, "the same as a share of all steps", unit="0..1", off="0")
    ema_decay: float = _flag(0.0, "moving average of the weights, which is what is evaluated and saved", off="0")
    distill: float = _flag(0.0, "share of the loss that is KL to the original model", unit="0..1", off="0")
    distill_temperature: float = _flag(1.0, "temperature of both distributions of --distill")
    load_best_model_at_end: bool = _flag(False, "save the weights of the best evaluation, not the last ones")
    early_stopping_patience: int = _flag(
        0, "stop after so many evaluations without a better one", unit="evaluations", off="0"
    )
    early_stopping_threshold: float = _flag(0.0, "how much better counts as better", unit="nats")
    max_grad_norm: float = _flag(1.0, "gradients are scaled down to this norm", off="0")
    adam_beta1: float = _flag(0.9, "AdamW: decay of the mean gradient")
    adam_beta2: float = _flag(0.999, "AdamW: decay of the mean squared gradient")
    adam_epsilon: float = _flag(1e-8, "AdamW: added to the denominator")
    seed: int = _flag(42, "order of the blocks, dropout, masks, split")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = _flag(
        None, "autocast: no, bf16, fp16; default: as `accelerate launch` says", off="no"
    )
    bf16: bool = _flag(False, "the same as --mixed_precision bf16")
    fp16: bool = _flag(False, "the same as --mixed_precision fp16 (needs a GPU)")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = _flag(
        "float32",
        "of the weights: float32, bfloat16, float16, or auto: as they are",
        aliases=("torch_dtype",),
    )
    chunked_cross_entropy: Literal["auto", "off"] = _flag(
        "auto",
        "auto: never make the logits whole, where that is exact; or off",
    )
    ops: Literal["auto", "lean", "tiled", "reference"] = _flag("auto", "kernels of gated blocks", off="reference")
    gradient_checkpointing: bool = _flag(False, "recompute activations in the backward: less memory, more time")
    eval_steps: int = _flag(0, "evaluate every so many steps, besides step 0 and the end", unit="steps", off="0")
    save_steps: int = _flag(500, "write a checkpoint every so many steps and at the end", unit="steps", off="0")
    logging_steps: int = _flag(
        10, "print a line every so many steps; train_log.jsonl has them all", unit="steps", off="0"
    )
    use_cpu: bool = _flag(False, "stay on the CPU even where there is a GPU", aliases=("no_cuda",))
    ddp_find_unused_parameters: bool = _flag(False, "let several processes train a model that leaves parameters unused")

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "1 or more", "Give a whole number.")
        for name in (
            "learning_rate",
            "weight_decay",
            "warmup_steps",
            "max_grad_norm",
            "eval_steps",
            "save_steps",
            "logging_steps",
            "early_stopping_patience",
            "early_stopping_threshold",
        ):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}", "0 or more", "0 switches it off.")
        _require(
            self.early_stopping_patience == 0 or self.eval_steps > 0,
            f"early_stopping_patience={self.early_stopping_patience:g} without eval_steps",
            "evaluations along the way to wait for",
            "Say how often with --eval_steps.",
        )
        _require(0 <= self.distill <= 1, f"distill={self.distill:g}", "0 to 1", "1 leaves the labels out.")
        _require(
            self.distill_temperature > 0, f"distill_temperature={self.distill_temperature:g}", "above 0", "1 is usual."
        )
        _require(self.lora_r >= 1, f"lora_r={self.lora_r}", "1 or more", "8 to 64 are usual.")
        for name in ("adam_beta1", "adam_beta2", "warmup_ratio", "ema_decay", "lora_dropout"):
            _require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)}", "0 <= value < 1", "Give a share.")
        _require(
            0 < self.layerwise_lr_decay <= 1,
            f"layerwise_lr_decay={self.layerwise_lr_decay:g}",
            "more than 0, at most 1",
            "0.9 is usual.",
        )
        _require(
            self.value_learning_rate is None or (self.value_learning_rate >= 0 and self.learning_rate > 0),
            f"value_learning_rate={self.value_learning_rate} and learning_rate={self.learning_rate:g}",
            "0 or more, beside a learning rate of the rest",
            "To train nothing but the value branch: --train value.",
        )
        _require(
            self.max_steps == -1 or self.max_steps >= 1,
            f"max_steps={self.max_steps}",
            "1 or more, or -1 for --num_train_epochs",
            "Leave it out to train for whole epochs.",
        )
        _require(
            self.max_steps >= 1 or self.num_train_epochs > 0,
            f"num_train_epochs={self.num_train_epochs}",
            "more than 0",
            "Or give --max_steps.",
        )
        _require(
            not (self.warmup_steps and self.warmup_ratio),
            f"warmup_steps={self.warmup_steps:g} and warmup_ratio={self.warmup_ratio:g}",
            "one of the two",
            "Leave one out.",
        )
        asked = {p for p in (self.mixed_precision, self.bf16 and "bf16", self.fp16 and "fp16") if p}
        _require(len(asked) <= 1, " and ".join(sorted(map(str, asked))), "one mixed precision", "Leave one out.")
        self.scheduler_kwargs()

    def precision(self) -> Literal["no", "bf16", "fp16"] | None:
        """The mixed precision asked for by any of the three flags; None leaves it to accelerate."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else self.mixed_precision

    def warmup(self, total_steps: int) -> int:
        """Warm-up in whole steps of a run of `total_steps`.

        Raises:
            ConfigurationError: more warm-up than there are steps.
        """
        share = self.warmup_ratio or (self.warmup_steps if self.warmup_steps < 1 else 0.0)
        steps = -int(-share * total_steps // 1) if share else int(self.warmup_steps)
        _require(
            steps <= total_steps,
            f"warmup_steps={steps} in a run of {total_steps} steps",
            "at most as many as the run has",
            "Lower --warmup_steps, or raise --max_steps.",
        )
        return steps

    def scheduler_kwargs(self) -> dict[str, Any]:
        """`lr_scheduler_kwargs` read as JSON."""
        if self.lr_scheduler_kwargs is None:
            return {}
        try:
            read = json.loads(self.lr_scheduler_kwargs)
        except json.JSONDecodeError as error:
            raise ConfigurationError(
                f"lr_scheduler_kwargs={self.lr_scheduler_kwargs!r} is no JSON ({error}): expected an object such as "
                "'{\"min_lr\": 1e-6}'. Mind the double quotes."
            ) from error
        _require(
            isinstance(read, dict), f"lr_scheduler_kwargs={read!r}", "a JSON object", "Such as '{\"min_lr\": 1e-6}'."
        )
        return dict(read)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and what to make of it before training."""

    _argument_group_name = "model"

    model_name_or_path: str = _flag(dataclasses.MISSING, "Hub id or local folder", aliases=("model",))
    tokenizer_name: str | None = _flag(None, "Hub id or local folder of the tokenizer, where it is not the model's")
    model_revision: str | None = _flag(None, "branch, tag or commit on the Hub", aliases=("revision",))
    trust_remote_code: bool = _flag(False, "run code that comes with the model")
    pad_token: str | None = _flag(None, "token that fills rows up, where the tokenizer has none")
    attn_implementation: str | None = _flag(None, "eager, sdpa, flash_attention_2 ...; default: transformers' choice")
    convert: bool = _flag(False, "convert the FFN blocks before training")
    variant: str = _flag("geglu", "what to convert to: geglu, geglu_tanh, swiglu, reglu, bilinear, glu")
    layers: str | None = _flag(None, "layers to convert, such as 0-3 or 0,2,5; default: all")
    control: bool = _flag(False, "with --convert: train the unconverted model too, report both")

    def __post_init__(self) -> None:
        _require(
            self.convert or not self.control,
            "--control without --convert",
            "a conversion that the control is compared with",
            "Add --convert, or leave --control out.",
        )
        _require(
            self.convert or self.layers is None,
            f"--layers {self.layers} without --convert",
            "a conversion that the layers belong to",
            "Add --convert, or leave --layers out.",
        )


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Where the result goes."""

    _argument_group_name = "output"

    output_dir: str = _flag(dataclasses.MISSING, "folder for model, logs and checkpoints")
    overwrite_output_dir: bool = _flag(False, "replace what an earlier run left in the folder", aliases=("overwrite",))
    resume: str | None = _flag(
        None,
        "go on from the newest checkpoint in the folder, or from the one named",
        aliases=("resume_from_checkpoint",),
        nargs="?",
        const=LATEST,
        metavar="CHECKPOINT",
    )
    save_total_limit: int = _flag(2, "keep so many checkpoints, newest first", unit="checkpoints", off="0")
    report_to: list[str] | None = _flag(None, "trackers of accelerate: tensorboard, wandb, trackio, mlflow, all ...")
    sample_prompts: list[str] | None = _flag(
        None, "prompts to complete before and after; shown on the card", metavar="TEXT", tasks=_WRITE
    )
    num_generation_samples: int = _flag(
        0, "so many held-out examples as prompts besides", unit="prompts", off="0", tasks=_WRITE
    )
    generation_max_new_tokens: int = _flag(64, "length of a completion", unit="tokens", tasks=_WRITE)
    generation_temperature: float = _flag(0.7, "of its sampling", off="0", tasks=_WRITE)
    push_to_hub: bool = _flag(False, "push the finished variant to the Hub, private, checked before and after")
    hub_model_id: str | None = _flag(None, "where to; default: your name, and that of the folder", metavar="OWNER/NAME")
    plan: bool = _flag(False, "say what the run would take, from two steps; write nothing")
    max_memory: str | None = _flag(None, "with --plan: how the same steps fit into so much, such as 8GB")

    def __post_init__(self) -> None:
        _require(
            not (self.overwrite_output_dir and self.resume),
            "--overwrite_output_dir and --resume",
            "one of the two",
            "--resume goes on with a run, --overwrite_output_dir starts anew.",
        )
        _require(
            self.plan or self.max_memory is None,
            f"--max_memory {self.max_memory} without --plan",
            "a plan that it belongs to",
            "Add --plan.",
        )
        _require(
            self.push_to_hub or self.hub_model_id is None,
            f"--hub_model_id {self.hub_model_id} without --push_to_hub",
            "a push that goes there",
            "Add --push_to_hub.",
        )
        _require(self.save_total_limit >= 0, f"save_total_limit={self.save_total_limit}", "0 or more", "0 keeps all.")
        for name in ("num_generation_samples", "generation_temperature"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}", "0 or more", "0 switches it off.")
        given = self.generation_max_new_tokens
        _require(given >= 1, f"generation_max_new_tokens={given}", "1 or more", "64 is a few lines.")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All settings of `finetune`.

    Raises:
        ConfigurationError: settings of two groups that exclude each other.
    """

    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    output: OutputSettings

    def __post_init__(self) -> None:
        _require(
            not self.data.streaming or self.train.max_steps >= 1,
            "--streaming without --max_steps",
            "the number of steps, since a stream does not say how long it is",
            "Add --max_steps.",
        )
