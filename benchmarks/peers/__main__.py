"""Is the recipe as fast and as lean as its peers? Ratios, round by round, every side in a process of its own.

python -m benchmarks.peers --script run_clm_no_trainer.py           # results/peers.json and docs/peers.md
python -m benchmarks.peers --script run_clm_no_trainer.py --quick   # a tiny model, one round, nothing is written

The script is not part of the transformers package and not of this one: take it from the repository of transformers,
folder examples/pytorch/language-modeling. Its SHA-256 is recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.peers.material import Texts, write_texts
from benchmarks.peers.page import PEAK, render
from benchmarks.peers.sides import CONVERTED, LAUNCH, PRECISIONS, SCRIPT, SFT
from benchmarks.records import RESULTS, write
from benchmarks.speed.clock import ratios
from benchmarks.speed.process import measured

WARM = 1
"""Steps of a run, besides the very first, that are not counted: kernels are compiled, the allocator fills up."""

Case: TypeAlias = dict[str, Any]

CASES: list[Case] = [
    {"precision": "bfloat16", "batch": 1, "block": 512},
    {"precision": "bfloat16", "batch": 4, "block": 512},
    {"precision": "float32", "batch": 1, "block": 256},
    {"precision": "bfloat16 autocast", "batch": 1, "block": 256},
]
"""As much as five gigabytes a process allow: in float32 weights, gradients and moments take 2.1 of them."""

QUICK: list[Case] = [{"precision": precision, "batch": 2, "block": 16} for precision in PRECISIONS]


def _say(line: str) -> None:
    print(line, flush=True)


def turns(
    job: str, case: Case, models: dict[str, str], texts: Texts, *, script: str, rounds: int, steps: int, say: Any
) -> dict[str, list[Case]]:
    """What the meter read off each side, round by round, each round beginning with another side.

    Args:
        job: "job" or "peak". case: precision, batch, block. models: folder of each side. texts: of this block.
        script: of the one side. rounds: how many. steps: of each run. say: takes a line.
    """
    names = list(LAUNCH)
    found: dict[str, list[Case]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for side in names[first:] + names[:first]:
            with tempfile.TemporaryDirectory() as scratch:
                run = measured(
                    job,
                    package="benchmarks.peers",
                    threads=1,
                    side=side,
                    model=models[side],
                    texts=asdict(texts),
                    steps=steps,
                    script=script,
                    scratch=scratch,
                    **case,
                )
            found[side].append(run)
            seconds, most = statistics.median(run["cpu"][WARM:]), run["peak"] / 2**30
            say(f"round {number + 1}  {case}  {side}: {seconds:.2f} CPU s a step, at most {most:.2f} GiB")
    batches = [run["batches"] for side in found.values() for run in side]
    if any(seen != batches[0] for seen in batches):
        raise RuntimeError("the sides saw different batches: the comparison would not be one")
    return found


def times(found: dict[str, list[Case]]) -> Case:
    """Ratios within a round and their medians (absolute times stay in no record), and the losses."""

    def over(clock: str, base: str) -> dict[str, float]:
        return ratios(
            {side: [statistics.median(run[clock][WARM:]) for run in of_it] for side, of_it in found.items()}, over=base
        )

    base = found[SCRIPT][0]["losses"]
    return {
        "rounds": len(found[SCRIPT]),
        "steps of a run": len(found[SCRIPT][0]["cpu"]) - WARM,
        "cpu over script": over("cpu", SCRIPT),
        "cpu over TRL": over("cpu", SFT),
        "wall over script": over("wall", SCRIPT),
        "losses": {side: [round(loss, 5) for loss in of_it[0]["losses"]] for side, of_it in found.items()},
        "largest difference of losses to the script": {
            side: max(abs(a - b) for a, b in zip(of_it[0]["losses"], base, strict=True))
            for side, of_it in found.items()
        },
    }


def peaks(found: dict[str, list[Case]]) -> Case:
    """Bytes of each side at its highest beyond those that it held when the model was loaded."""
    return {PEAK: {side: runs[0]["peak"] - runs[0]["loaded"] for side, runs in found.items()}}


def run(
    script: Path,
    *,
    quick: bool,
    only: list[str],
    batch: list[int],
    parts: list[str],
    rounds: int,
    timed: int,
    say: Any = _say,
) -> Case:
    """The cases of these precisions and batches (all, where none is named) as one record, as far as `parts` go."""
    content = script.read_text(encoding="utf-8")
    checked = re.search(r'check_min_version\("([^"]+)"\)', content)
    record: Case = {
        "trl": version("trl"),
        "accelerate": version("accelerate"),
        "warm": WARM,
        "script": {
            "sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
            "asks for transformers": checked and checked.group(1),
        },
        "cases": [],
    }
    cases = [case for case in (QUICK if quick else CASES) if case["precision"] in only]
    cases = [case for case in cases if not batch or case["batch"] in batch]
    with tempfile.TemporaryDirectory(prefix="peers-") as made:
        folder = Path(made)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        source, documents = (_tiny if quick else _real)(folder)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source)
        for case in cases:
            dtype = "bfloat16" if case["precision"] == "bfloat16" else "float32"
            models = {}
            for side in LAUNCH:
                name = folder / f"{dtype}{'-converted' * (side == CONVERTED)}"
                if not name.exists():
                    made_of = {"source": str(source), "dtype": dtype, "converted": side == CONVERTED}
                    measured("models", package="benchmarks.peers", threads=1, folder=str(name), **made_of)
                models[side] = str(name)
            place = folder / f"texts-{case['block']}"
            place.mkdir(exist_ok=True)
            draws = max(4, case["batch"] * (1 + WARM + timed))
            texts = write_texts(place, documents, tokenizer, block=case["block"], draws=draws)
            row, given = dict(case), {"script": str(script.resolve()), "say": say}
            if "time" in parts:
                row |= times(turns("job", case, models, texts, rounds=rounds, steps=1 + WARM + timed, **given))
            if "peak" in parts:
                row |= peaks(turns("peak", case, models, texts, rounds=1, steps=1 + WARM + 1, **given))
            record["cases"].append(row)
    return record


def _real(_: Path) -> tuple[Path, list[str]]:
    from benchmarks.corpora import corpus
    from hf_geglu.demo.weights import smollm2_folder

    return smollm2_folder(), list(corpus("manuals").train)


def _tiny(folder: Path) -> tuple[Path, list[str]]:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from hf_geglu.demo.weights import smollm2_folder

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return folder / "tiny", ["A sentence of nine words, said again and again."] * 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="a copy of run_clm_no_trainer.py")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round; prints, writes nothing")
    parser.add_argument("--only", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batch", nargs="+", type=int, default=[], help="only cases with so many blocks a step")
    parser.add_argument("--parts", nargs="+", choices=["time", "peak"], default=["time", "peak"])
    parser.add_argument("--rounds", type=int, default=3, help="of time: each has one run of every side")
    parser.add_argument("--timed", type=int, default=4, help="steps of a run that are counted")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    wanted = {"only": args.only, "batch": args.batch, "parts": args.parts, "rounds": rounds, "timed": args.timed}
    found = run(args.script, quick=args.quick, **wanted)
    if args.quick:
        print(json.dumps(found, indent=1))
        return
    path = RESULTS / "peers.json"
    kept = {_key(case): case for case in json.loads(path.read_text("utf-8"))["cases"]} if path.is_file() else {}
    for case in found["cases"]:
        kept[_key(case)] = {**kept.get(_key(case), {}), **case}
    write("peers", {**found, "cases": [kept[_key(case)] for case in CASES if _key(case) in kept]})
    render(json.loads(path.read_text("utf-8")))


def _key(case: Case) -> str:
    return f"{case['precision']} {case['batch']} {case['block']}"


if __name__ == "__main__":
    main()
