"""`hf-geglu demo`: the main job on a real model and real text, with every number beside its control."""

from __future__ import annotations

import copy
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file

from hf_geglu.converting import convert
from hf_geglu.demo.ledger import Ledger, Row
from hf_geglu.demo.naive import naive_swap
from hf_geglu.demo.text import stdlib_corpus
from hf_geglu.demo.weights import smollm2_folder
from hf_geglu.distance import compare
from hf_geglu.errors import HfGegluError
from hf_geglu.hub import check_output, load, load_processor, save_folder, whole_folder
from hf_geglu.modes import evaluating
from hf_geglu.planning import make_plan
from hf_geglu.provenance import LedgerRow, TrainingRecord
from hf_geglu.skeleton import architecture
from hf_geglu.surgery import forget_original
from hf_geglu.training import (
    EvalRecord,
    LanguageTask,
    Objective,
    StepRecord,
    TokenBlocks,
    TrainResult,
    TrainSettings,
    blocks_from_texts,
    evaluate,
    objective_for,
    train,
)
from hf_geglu.training.reports.lineage import tokens_sha256
from hf_geglu.training.reports.picture import loss_curves

BLOCK_SIZE = 128
"""Tokens a block: short ones leave a CPU more steps in the same time."""
BATCH = 4
HELD_OUT_BLOCKS = 32
KL_BLOCKS = 16
LEARNING_RATE = 5e-5
"""Both runs have the same; the Trainer's default."""


@dataclass(frozen=True)
class _Material:
    """What every measurement of one run shares."""

    task: LanguageTask
    objective: Objective
    train: TokenBlocks
    held_out: TokenBlocks

    def divergence(self, original: Any, model: Any) -> float:
        """KL(original || model) on the first held-out blocks."""
        blocks = [torch.as_tensor(self.held_out[number]["input_ids"]) for number in range(self.kl_blocks)]
        batches = [{"input_ids": torch.stack(blocks[at : at + BATCH])} for at in range(0, len(blocks), BATCH)]
        kl = compare(original, model, batches).kl
        assert kl is not None
        return kl

    @property
    def kl_blocks(self) -> int:
        return min(KL_BLOCKS, len(self.held_out))


def run_demo(
    model: str | None,
    output_dir: Path,
    *,
    steps: int,
    overwrite: bool = False,
    console: Console | None = None,
    command: Sequence[str] = (),
) -> Ledger:
    """Find, plan, convert, verify, fine-tune beside a control, save, and reload in a process without this package.

    Args:
        model: a causal or masked language model, Hub id or folder; None for SmolLM2-135M out of a PyPI wheel.
        output_dir: gets the variant, `ledger.json` and `loss.png`: all of it or nothing.
        steps: optimizer steps of each of the two trainings.
        overwrite: replace what `output_dir` holds.
        console: where to print.
        command: words of the command line, for the manifest.

    Raises:
        OutputError: `output_dir` must not be written.
        HfGegluError: the model is neither a causal nor a masked language model, or anything that `convert` raises.
    """
    begin = time.perf_counter()
    console = console or Console()
    check_output(output_dir, overwrite=overwrite)

    console.rule("model and text")
    folder = str(smollm2_folder(progress=console.print)) if model is None else model
    name = "SmolLM2-135M-Instruct" if model is None else Path(model).name
    original, tokenizer, task = _load(folder)
    material = _material(tokenizer, task, console)

    console.rule("plan")
    plan = make_plan(original)
    console.print(_shortened(str(plan)), highlight=False)

    console.rule("convert and verify")
    naive = naive_swap(original, plan)
    variant = copy.deepcopy(original)
    report = convert(variant, plan)
    forget_original(variant)
    console.print(str(report), highlight=False)

    console.rule("how far from the original")
    divergence = {}
    for label, each in (("naive swap", naive), ("hf_geglu, step 0", variant)):
        with console.status(f"{label}: running both models on {material.kl_blocks} blocks"):
            divergence[label] = material.divergence(original, each)
        console.print(f"{label}: KL {divergence[label]:.5f} nats a token", highlight=False)
    with console.status("naive swap: held-out text"):
        naive_nll = evaluate(naive, material.held_out, objective=material.objective, batch_size=BATCH).nll
    del naive

    console.rule(f"fine-tune: {steps} steps on the same batches")
    control = copy.deepcopy(original)
    trained = _train(variant, material, steps, "variant", console)
    controlled = _train(control, material, steps, "control", console)
    with console.status("how far the two trained models are from the original"):
        divergence |= {
            "variant": material.divergence(original, variant),
            "control": material.divergence(original, control),
        }
    rows = (
        Row("original", controlled.evals[0].nll, None),
        Row("naive swap", naive_nll, divergence["naive swap"]),
        Row("hf_geglu, step 0", trained.evals[0].nll, divergence["hf_geglu, step 0"]),
        Row(f"hf_geglu, step {steps}", trained.evals[-1].nll, divergence["variant"]),
        Row(f"control, step {steps}", controlled.evals[-1].nll, divergence["control"]),
    )

    with whole_folder(output_dir, overwrite=overwrite) as draft:
        console.rule("save, and reload in a clean process")
        saved = draft / "variant"
        curves = _picture(draft / "loss.png", name, rows, trained, controlled)
        record = _record(task, rows, material, trained)
        save_folder(variant, saved, tokenizer=tokenizer, training=record, command=command, curves=curves)
        difference = _reload(saved, variant, material)
        how = "plain transformers" if report.tier == "native" else "trust_remote_code=True"
        console.print(f"without hf_geglu, by {how}: largest difference of logits {difference}", highlight=False)
        ledger = Ledger(
            model=name,
            rows=rows,
            steps=steps,
            train_tokens=trained.tokens,
            held_out_tokens=trained.evals[-1].tokens,
            kl_tokens=material.kl_blocks * (BLOCK_SIZE - (task == "clm")),
            reload_difference=difference,
            reload_with=how,
            seconds=round(time.perf_counter() - begin, 1),
        )
        (draft / "ledger.json").write_text(json.dumps(ledger.to_dict(), indent=2) + "\n", encoding="utf-8")

    console.rule("ledger")
    console.print(ledger.table())
    gap = rows[3].nll - rows[4].nll
    console.print(
        f"after the same {steps} steps the variant is {gap:+.4f} nats a token from its control", highlight=False
    )
    console.print(f"variant, ledger.json and loss.png: {output_dir}; {ledger.seconds:.0f} s", highlight=False)
    return ledger


def _load(folder: str) -> tuple[Any, Any, LanguageTask]:
    from transformers import AutoConfig

    kind = architecture(AutoConfig.from_pretrained(folder))
    tasks: dict[str, LanguageTask] = {"CausalLM": "clm", "LMHeadModel": "clm", "MaskedLM": "mlm"}
    task = next((task for ending, task in tasks.items() if kind.__name__.endswith(ending)), None)
    if task is None:
        raise HfGegluError(
            f"the demo trains causal and masked language models, but {Path(folder).name} is a {kind.__name__}; "
            "`hf-geglu convert` takes any model"
        )
    model = load(kind, folder, dtype=torch.float32)
    tokenizer = load_processor(folder)
    if tokenizer is None:
        raise HfGegluError(f"{Path(folder).name} has no tokenizer; expected one beside its weights")
    return model, tokenizer, task


def _material(tokenizer: Any, task: LanguageTask, console: Console) -> _Material:
    corpus = stdlib_corpus()
    train_blocks, tally = blocks_from_texts(corpus.train, tokenizer, block_size=BLOCK_SIZE, task=task)
    held_out, _ = blocks_from_texts(corpus.held_out, tokenizer, block_size=BLOCK_SIZE, task=task)
    held_out = TokenBlocks.of(
        [held_out[number]["input_ids"].tolist() for number in range(min(HELD_OUT_BLOCKS, len(held_out)))]
    )
    console.print(
        f"documentation of the Python standard library: {tally.line('train')}; "
        f"{len(held_out)} blocks of other modules held out",
        highlight=False,
    )
    return _Material(task, objective_for(task, tokenizer), train_blocks, held_out)


def _settings(steps: int) -> TrainSettings:
    return TrainSettings(
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        eval_steps=max(1, steps // 2),
        save_steps=0,
        use_cpu=not torch.cuda.is_available(),
    )


def _train(model: Any, material: _Material, steps: int, name: str, console: Console) -> TrainResult:
    settings = _settings(steps)
    with _bar(console, name, steps) as bar:

        def on_step(record: StepRecord) -> None:
            bar.update(
                bar.task_ids[0], advance=1, note=f"loss {record.loss:.3f}, {record.tokens_per_second:,.0f} tokens/s"
            )

        def on_eval(record: EvalRecord) -> None:
            bar.update(bar.task_ids[0], note=f"held-out nll {record.nll:.4f}")

        return train(
            model,
            material.train,
            material.held_out,
            settings,
            objective=material.objective,
            on_step=on_step,
            on_eval=on_eval,
        )


@contextmanager
def _bar(console: Console, name: str, total: int) -> Iterator[Progress]:
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        bar.add_task(name, total=total, note="measuring the start")
        yield bar


def _reload(folder: Path, variant: Any, material: _Material) -> float:
    """Largest difference of logits between the model in memory and its saved copy in a process that knows only
    transformers."""
    auto_class = "AutoModelForCausalLM" if material.task == "clm" else "AutoModelForMaskedLM"
    input_ids = torch.as_tensor(material.held_out[0]["input_ids"])[None]
    with evaluating(variant), torch.no_grad():
        logits = variant(input_ids=input_ids).logits
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch) / "expected.safetensors"
        save_file({"input_ids": input_ids, "logits": logits.contiguous()}, expected)
        script = Path(__file__).with_name("reload.py")
        # -I: neither this package's folder nor the user's environment is on the path of that process
        result = subprocess.run(
            [sys.executable, "-I", str(script), str(folder.resolve()), auto_class, str(expected)],
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode:
        raise HfGegluError(f"the saved variant does not load in a clean process: {result.stderr.strip()[-600:]}")
    return float(result.stdout.split()[-1])


def _picture(path: Path, name: str, rows: Sequence[Row], trained: TrainResult, controlled: TrainResult) -> Path:
    original, naive = rows[:2]
    return loss_curves(
        path,
        {
            "control": [(record.step, record.nll) for record in controlled.evals],
            "hf_geglu": [(record.step, record.nll) for record in trained.evals],
        },
        marks={"original": original.nll, "naive swap": naive.nll},
        title=f"{name}: fine-tuning the variant and its control",
    )


def _record(task: LanguageTask, rows: Sequence[Row], material: _Material, trained: TrainResult) -> TrainingRecord:
    """For manifest and card of the variant."""
    settings = _settings(len(trained.steps))
    return TrainingRecord(
        task=task,
        steps=len(trained.steps),
        tokens=trained.tokens,
        seed=settings.seed,
        data="documentation of the Python standard library",
        revision=f"Python {platform.python_version()}",
        data_fingerprint=tokens_sha256(material.train),
        settings={
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": settings.lr_scheduler_type,
            "warmup_ratio": settings.warmup_ratio,
            "batch": BATCH,
            "block_size": BLOCK_SIZE,
        },
        ledger=tuple(LedgerRow(name=row.name, nll=row.nll, perplexity=row.perplexity, kl=row.kl) for row in rows),
        held_out_tokens=trained.evals[-1].tokens,
        control=True,
    )


def _shortened(text: str, *, head: int = 8, tail: int = 1) -> str:
    """The first and last lines of a long plan."""
    lines = text.splitlines()
    if len(lines) <= head + tail + 1:
        return text
    return "\n".join([*lines[:head], f"  ... {len(lines) - head - tail} more blocks", *lines[-tail:]])
