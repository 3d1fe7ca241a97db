"""Peak memory as `--plan` estimates it, beside that of the run: `python -m benchmarks.plan_memory [--only NAME]`.

For each case two processes with the same settings: one makes the plan, the other trains, evaluates, writes
checkpoints and saves the model. Both figures are the highest resident memory of the process less what it had after its
imports, so that the imports (0.5 GB) do not flatter the estimate. Models have the published shapes, fewer layers where
said, and random weights.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.speed.process import QUIET

SHAPES = {
    "GPT-2 small, 2 layers": ("gpt2", "clm", "--block_size 64 --per_device_train_batch_size 4"),
    "SmolLM2-135M, 4 layers": ("smollm2", "clm", "--block_size 128 --per_device_train_batch_size 4"),
    "MiniLM-L6": ("minilm", "mlm", "--block_size 128 --per_device_train_batch_size 8"),
}
"""Name -> model that is built, recipe, flags."""

CASES = {
    "as it comes": "",
    "no kernels, whole logits": "--ops reference --chunked_cross_entropy off",
    "gradient checkpointing": "--gradient_checkpointing",
    "value branches": "--convert --train value",
    "LoRA": "--train lora",
    "EMA, best model": "--ema_decay 0.99 --load_best_model_at_end",
}
IMPORTED = (
    *("torch", "datasets", "accelerate", "peft", "matplotlib.pyplot", "transformers.models.gpt2.modeling_gpt2"),
    *("transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert", "hf_geglu.hub"),
    *("hf_geglu.training.command_line", "hf_geglu.training.reports.picture"),
)
ALLOWED = 0.15
RUN = "--max_steps 3 --save_steps 2 --max_eval_samples 12 --eval_steps 2 --use_cpu --logging_steps 0"


def build(kind: str, folder: Path) -> None:
    """A model with a tokenizer of 2,000 words, and text of them."""
    import random

    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "[UNK]", "eos_token": "[SEP]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special |= {"mask_token": "[MASK]", "pad_token": "[PAD]"}
    words = [f"w{number}" for number in range(2000)]
    vocabulary = {word: number for number, word in enumerate([*dict.fromkeys(special.values()), *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = (json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(100, 300)))}) for _ in range(400))
    (folder / "text.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

    torch.manual_seed(0)
    config: Any
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2)
        model: Any = transformers.GPT2LMHeadModel(config)
    elif kind == "smollm2":
        config = transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=4,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        model = transformers.BertForMaskedLM(config)
    model.save_pretrained(folder / "model")


def job(what: str, task: Any, words: list[str]) -> dict[str, int]:
    """In a process of its own: the peak, and what there was after the imports, in bytes."""
    import torch

    from hf_geglu.training import finetune
    from hf_geglu.training.command_line import parse
    from hf_geglu.training.forecast import forecast_run

    torch.set_num_threads(1)
    _ = (torch.zeros(8, 8, requires_grad=True) @ torch.zeros(8, 8)).sum().backward()  # what is set up once
    settings = parse(words, task)
    base = _status("VmRSS")
    if what == "plan":
        return {"base": base, "peak": forecast_run(settings, task).peak_bytes}
    finetune(settings, task)
    return {"base": base, "peak": _status("VmHWM")}


def _status(entry: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024


def forked(work: Callable[[], Any], folder: Path) -> Any:
    """What `work` returns in a fork of this process, which has imported everything and computed nothing.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    said, told = folder / "said.txt", folder / "told.json"
    child = os.fork()
    if not child:
        code = 1
        try:
            with said.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(folder)
            import datasets

            datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
            told.write_text(json.dumps(work()), encoding="utf-8")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"a process failed:\n{said.read_text()[-3000:]}")
    return json.loads(told.read_text(encoding="utf-8"))


def compare(shape: str, case: str) -> dict[str, Any]:
    """Estimate and measurement of one case."""
    kind, task, flags = SHAPES[shape]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        forked(lambda: build(kind, folder), folder)
        words = f"--model_name_or_path model --train_file text.jsonl --output_dir out {RUN} {flags} {CASES[case]}"
        plan = forked(lambda: job("plan", task, [*words.split(), "--plan"]), folder)
        run = forked(lambda: job("run", task, words.split()), folder)
    estimate, truth = plan["peak"] - plan["base"], run["peak"] - run["base"]
    return {
        "shape": shape,
        "case": case,
        "estimate_mib": round(estimate / 2**20),
        "measured_mib": round(truth / 2**20),
        "error": round(estimate / truth - 1, 4),
        "base_mib": round(run["base"] / 2**20),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """For docs/finetuning.md."""
    lines = ["| model | settings | estimate, MiB | measured, MiB | error |", "|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row['estimate_mib']:,} | {row['measured_mib']:,} | {row['error']:+.1%}"
        lines.append(f"| {row['shape']} | {row['case']} | {figures} |")
    worst = max(abs(row["error"]) for row in rows)
    return "\n".join([*lines, "", f"Largest error {worst:.1%}; allowed {ALLOWED:.0%}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose model and settings contain this; they are merged in")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ |= {**QUIET, "TOKENIZERS_PARALLELISM": "false"}
    for name in IMPORTED:
        importlib.import_module(name)
    path = records.RESULTS / "plan_memory.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if options.only and path.exists() else []
    known = {(row["shape"], row["case"]): row for row in before}
    order = [(shape, case) for shape in SHAPES for case in CASES]
    rows: list[dict[str, Any]] = []
    for key in order:
        if options.only.lower() in " ".join(key).lower():
            known[key] = compare(*key)
            print(known[key], flush=True)
            rows = [known[each] for each in order if each in known]
            records.write("plan_memory", {"allowed": ALLOWED, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
