"""The sides: each is started the way its users start it, with the same settings in its own words.

AdamW without weight decay, a linear schedule from the peak on, no gradient clipping (run_clm_no_trainer.py has none),
no gradient checkpointing, no evaluation. What the sides do of their own accord stays: TRL's fused AdamW, its entropy
and token accuracy of each step; our log of each step and its gradient norm.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.peers.material import SEED, Texts

RATE = 5e-5

PRECISIONS = ("float32", "bfloat16 autocast", "bfloat16")
"""Of the arithmetic: everything in float32; autocast over float32 weights (what `--bf16` means to all sides); weights,
gradients and moments in bfloat16."""


@dataclass(frozen=True)
class Request:
    """One training.

    Attributes:
        model: folder; its weights are in float32, or in bfloat16 for the last precision.
        texts: what to train on.
        batch, block: blocks a step, tokens a block.
        steps: of the run.
        precision: one of `PRECISIONS`.
        script: a copy of run_clm_no_trainer.py.
        scratch: an empty folder.
    """

    model: str
    texts: Texts
    batch: int
    block: int
    steps: int
    precision: str
    script: str
    scratch: str

    @property
    def autocast(self) -> bool:
        """Whether weights and arithmetic differ."""
        return self.precision == "bfloat16 autocast"

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return "bfloat16" if self.precision == "bfloat16" else "float32"


def run_script(request: Request) -> None:
    """transformers' examples/pytorch/language-modeling/run_clm_no_trainer.py, the file as it is, with two of its names
    changed: DataLoader takes the blocks in the given order instead of shuffling them, and DistributedType has the TPU
    that accelerate 1.15 no longer has."""
    from torch.utils.data import DataLoader

    if request.autocast:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch --mixed_precision bf16` does
    spec = importlib.util.spec_from_file_location("run_clm_no_trainer", request.script)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(request.script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def in_order(blocks: Any, *, shuffle: bool = False, **kwargs: Any) -> Any:
        return DataLoader(_ordered(blocks, request.texts) if shuffle else blocks, **kwargs)

    module.DataLoader = in_order  # type: ignore[attr-defined]
    if not hasattr(module.DistributedType, "TPU"):
        module.DistributedType = SimpleNamespace(TPU=None)  # type: ignore[attr-defined]
    sys.argv = ["run_clm_no_trainer.py", "--model_name_or_path", request.model]
    sys.argv += ["--train_file", request.texts.train, "--validation_file", request.texts.held_out]
    sys.argv += ["--block_size", str(request.block), "--per_device_train_batch_size", str(request.batch)]
    sys.argv += ["--learning_rate", str(RATE), "--max_train_steps", str(request.steps), "--seed", str(SEED)]
    module.main()


def run_sft(request: Request) -> None:
    """TRL's SFTTrainer on blocks that are tokenised and cut already."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(request.model)
    text = json.loads(Path(request.texts.train).read_text(encoding="utf-8"))["text"]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = len(ids) // request.block * request.block
    blocks = Dataset.from_dict(
        {"input_ids": [ids[begin : begin + request.block] for begin in range(0, whole, request.block)]}
    )
    arguments = SFTConfig(
        output_dir=request.scratch,
        model_init_kwargs={"dtype": request.dtype},
        max_length=request.block,
        max_steps=request.steps,
        per_device_train_batch_size=request.batch,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        bf16=request.autocast,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    SFTTrainer(
        model=request.model,
        args=arguments,
        train_dataset=_ordered(blocks, request.texts),
        processing_class=tokenizer,
    ).train()


def run_recipe(request: Request) -> None:
    """`hf-geglu finetune clm`; all that is on by default is on."""
    from hf_geglu.training.command_line import main

    words = ["--model_name_or_path", request.model, "--output_dir", str(Path(request.scratch) / "out")]
    words += ["--train_file", request.texts.train, "--validation_split_percentage", "0"]
    words += ["--packing_strategy", "wrapped", "--block_size", str(request.block)]
    words += ["--per_device_train_batch_size", str(request.batch), "--max_steps", str(request.steps)]
    words += ["--learning_rate", str(RATE), "--max_grad_norm", "0", "--save_steps", "0", "--seed", str(SEED)]
    words += ["--use_cpu", "--dtype", request.dtype, *["--bf16"] * request.autocast]
    if main("clm", words):
        raise RuntimeError("the recipe ended with an error")


def _ordered(blocks: Any, texts: Texts) -> Any:
    """The blocks of a `datasets.Dataset` as the recipe draws them.

    Raises:
        RuntimeError: another number of blocks than the others have.
    """
    if len(blocks) != len(texts.order):
        raise RuntimeError(f"{len(blocks)} blocks: expected {len(texts.order)}")
    return blocks.select(texts.order)


SCRIPT, SFT, PLAIN, CONVERTED = (
    "run_clm_no_trainer.py",
    "TRL SFTTrainer",
    "hf-geglu, unconverted",
    "hf-geglu, converted",
)
LAUNCH: dict[str, Callable[[Request], None]] = {
    SCRIPT: run_script,
    SFT: run_sft,
    PLAIN: run_recipe,
    CONVERTED: run_recipe,
}
"""The last side trains another model folder, the converted one."""
