"""What do the gates of a fine-tuned variant do, and what does it cost to look? docs/inspect.md, with its plots.

MiniLM (dense GELU) converted and trained on masked tokens with the recipe, before and after; SmolLM2-135M (SwiGLU) as
it is. Text: documentation of Python's standard library, held-out part. Memory and time are those of processes of their
own: one that only runs the model over the tokens, and one that inspects it.

    python -m benchmarks.inspect_gates                     # trains 150 steps first, about 15 CPU minutes
    python -m benchmarks.inspect_gates --trained FOLDER    # what that left in WORK/trained
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_geglu
from benchmarks.records import write
from hf_geglu.cli.texts import batches_of
from hf_geglu.demo.text import stdlib_corpus
from hf_geglu.demo.weights import minilm_folder, smollm2_folder
from hf_geglu.inspecting import GateReport, inspect_gates
from hf_geglu.inspecting.picture import draw

DOCS = Path(__file__).parent.parent / "docs"
STEPS, RATE = 150, 3e-4
TOKENS = 4096
FEW, MANY, SHOWN = 256, 1024, 512


def train(work: Path) -> Path:
    """The fine-tuning, by the recipe's own code."""
    from hf_geglu.training import DataSettings, ModelSettings, OutputSettings, RunSettings, TrainSettings, finetune

    corpus = stdlib_corpus()
    files = {}
    for name, texts in (("train", corpus.train), ("held_out", corpus.held_out)):
        files[name] = work / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    settings = RunSettings(
        model=ModelSettings(model_name_or_path=str(minilm_folder(progress=print)), convert=True),
        data=DataSettings(
            train_file=[str(files["train"])],
            validation_file=[str(files["held_out"])],
            max_eval_samples=40,
            block_size=128,
        ),
        train=TrainSettings(
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=RATE,
            warmup_steps=10,
            eval_steps=STEPS // 2,
            save_steps=0,
        ),
        output=OutputSettings(output_dir=str(work / "trained")),
    )
    finetune(settings, "mlm")
    return work / "trained"


def minilm(trained: Path) -> tuple[GateReport, dict[str, Any]]:
    """Before and after, and which blocks would collapse."""
    base = minilm_folder(progress=print)
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = AutoModel.from_pretrained(base).eval()
    hf_geglu.convert(before)
    after = AutoModel.from_pretrained(trained).eval()
    batches = batches_of(["builtin"], after, tokenizer, tokens=TOKENS)
    report = inspect_gates(after, batches, before=before, name="MiniLM")
    again = hf_geglu.collapse(before)
    assert again.plan.whole
    stays = hf_geglu.collapse(after, tolerance=0.5, inputs=batches[:2])
    record = {
        "untrained": {"collapsed": again.collapsed, "largest_difference": again.comparisons[0].max_abs},
        "trained": [{"path": kept.path, "reason": kept.reason} for kept in stays.plan.kept],
    }
    return report, record


def looked_at(what: str, tokens: int) -> dict[str, Any]:
    """CPU seconds and peak memory of a process that runs SmolLM2 over some text, or inspects it."""
    command = [sys.executable, "-m", "benchmarks.inspect_gates", "--measure", what, "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(what, tokens, measured)
    return measured


def measure(what: str, tokens: int) -> None:
    """In such a process."""
    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    whole = batches_of(["builtin"], model, AutoTokenizer.from_pretrained(folder), tokens=tokens)
    batches = [{"input_ids": rows} for batch in whole for rows in batch["input_ids"].split(2)]  # 256 tokens each
    start = time.process_time()
    if what == "run":
        with torch.no_grad():
            for batch in batches:
                model(**batch, use_cache=False)
    else:
        inspect_gates(model, batches)
    used = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"cpu_seconds": round(used, 1), "peak_mib": round(peak)}))


def smollm2() -> GateReport:
    """The model as it is."""
    folder = smollm2_folder(progress=print)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    batches = batches_of(["builtin"], model, AutoTokenizer.from_pretrained(folder), tokens=SHOWN)
    return inspect_gates(model, batches, name="SmolLM2-135M")


def page(
    mini: GateReport, collapse: dict[str, Any], smol: GateReport, cost: dict[str, Any], run: dict[str, Any]
) -> str:
    """docs/inspect.md."""
    assert mini.before is not None
    run_few, look_few, look_many = cost["run"], cost["inspect"], cost["inspect_more"]
    first, last, untrained = run["first"], run["last"], collapse["untrained"]
    heard = ("closed", "dead", "duplicates", "value_share", "gate_share")
    lines = [
        "# What the gates do",
        "",
        "Written by `python -m benchmarks.inspect_gates`; every figure on this page was measured by it.",
        "",
        "    hf-geglu inspect MODEL --data builtin              # builtin: the documentation of Python's library",
        "    hf-geglu inspect TUNED --before BASE --data my.txt --plot gates --json gates.json",
        "    hf-geglu collapse TUNED SMALLER                    # blocks that learned nothing become dense again",
        "",
        "Without `--data` only the weights are looked at, and the table says so. What each column means is under it.",
        "",
        "## MiniLM: a dense GELU model, converted and trained",
        "",
        f"all-MiniLM-L6-v2, converted to GeGLU (exactly), then {STEPS} steps of masked language modelling with the "
        f"recipe (8 x 128 tokens a step, learning rate {RATE:g}, new head; held-out nll {first:.2f} -> {last:.2f}). "
        f"{mini.tokens:,} held-out tokens, before -> after:",
        "",
        *_table(
            mini, ("learned", "constant", "moved_gate", "closed", "dead", "duplicates", "value_share", "gate_share")
        ),
        "",
        "![What the gates of MiniLM do, before and after](inspect-minilm.png)",
        "",
        "Before the training every value is 1, so replacing it by its mean loses nothing; afterwards "
        f"{_span(mini, 'value_share', '.1%')} of the variance of a block's output hangs on it. The value branches have "
        f"moved to {_span(mini, 'learned', '.3f')} of their gates' norm in {STEPS} steps.",
        "",
        f"`collapse` on the model before: {untrained['collapsed']} of {len(mini.sites)} blocks become dense again, "
        f"largest difference of the outputs {untrained['largest_difference']:.3g}. After the training "
        "none does, and it says why, here with `tolerance=0.5`:",
        "",
        *[f"    {entry['path']}: {entry['reason']}" for entry in collapse["trained"]],
        "",
        "## SmolLM2-135M: gated from birth",
        "",
        f"{smol.tokens:,} tokens of the same text. Its start is not known, so the value branch has a size only.",
        "",
        *_table(smol, ("value_over_gate", *heard)),
        "",
        "![What the gates of SmolLM2 do](inspect-smollm2.png)",
        "",
        "## What looking costs",
        "",
        "SmolLM2-135M in float32, one CPU thread, 256 tokens a forward, each row a process of its own:",
        "",
        "| | tokens | CPU seconds | peak memory |",
        "|---|---|---|---|",
        f"| run the model once | {FEW:,} | {run_few['cpu_seconds']:.0f} | {run_few['peak_mib']:,} MiB |",
        f"| inspect it | {FEW:,} | {look_few['cpu_seconds']:.0f} | {look_few['peak_mib']:,} MiB |",
        f"| inspect it | {MANY:,} | {look_many['cpu_seconds']:.0f} | {look_many['peak_mib']:,} MiB |",
        "",
        "What is kept is some 1,600 bytes a neuron, however many tokens there are; the model runs twice, since shares "
        "of variance need the means first. Comparing every neuron with every other costs the same however long the "
        "text is. The machine was busy with other work, by which CPU seconds vary several times over: compare the rows "
        "for memory.",
    ]
    return "\n".join(lines) + "\n"


_TITLES = {
    "value_over_gate": ("\\|Wv\\|/\\|Wg\\|", ".3f"),
    "learned": ("Wv learned", ".3f"),
    "constant": ("bv off start", ".3f"),
    "moved_gate": ("Wg moved", ".3f"),
    "closed": ("closed", ".1%"),
    "dead": ("dead", "d"),
    "duplicates": ("duplicates", "d"),
    "value_share": ("lost with constant value", ".1%"),
    "gate_share": ("with constant gate", ".1%"),
}


def _table(report: GateReport, names: tuple[str, ...]) -> list[str]:
    lines = [f"| layer | {' | '.join(_TITLES[name][0] for name in names)} |", f"|{'---|' * (len(names) + 1)}"]
    for number, site in enumerate(report.sites):
        cells = []
        for name in names:
            now = format(getattr(site, name), _TITLES[name][1])
            if report.before is not None and not name.startswith("moved"):
                now = f"{format(getattr(report.before.sites[number], name), _TITLES[name][1])} -> {now}"
            cells.append(now)
        lines.append(f"| {site.layer} | {' | '.join(cells)} |")
    return lines


def _span(report: GateReport, name: str, form: str = ".0%") -> str:
    values = [getattr(site, name) for site in report.sites]
    return f"{min(values):{form}} to {max(values):{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, help="a folder that an earlier run has trained")
    parser.add_argument("--measure", choices=["run", "inspect"], help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=FEW, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        measure(options.measure, options.tokens)
        return
    with tempfile.TemporaryDirectory() as scratch:
        trained = options.trained or train(Path(scratch))
        evals = json.loads((trained / "results.json").read_text(encoding="utf-8"))["trained"]["evals"]
        mini, collapse = minilm(trained)
    cost = {
        "run": looked_at("run", FEW),
        "inspect": looked_at("inspect", FEW),
        "inspect_more": looked_at("inspect", MANY),
    }
    smol = smollm2()
    draw(mini, DOCS / "inspect-minilm", title=f"MiniLM as GeGLU, before and after {STEPS} steps")
    draw(smol, DOCS / "inspect-smollm2", title="SmolLM2-135M")
    run = {"first": evals[0]["nll"], "last": evals[-1]["nll"], "steps": STEPS, "learning_rate": RATE}
    (DOCS / "inspect.md").write_text(page(mini, collapse, smol, cost, run), encoding="utf-8")
    record = {"minilm": mini.to_dict(), "smollm2": smol.to_dict(), "collapse": collapse, "cost": cost, "training": run}
    write("inspect_gates", record)


if __name__ == "__main__":
    main()
