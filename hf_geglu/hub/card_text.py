"""The body of a model card, section by section."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hf_geglu.auto import auto_classes
from hf_geglu.hub.licence import BaseCard, Licence
from hf_geglu.hub.manifest import MANIFEST, Manifest
from hf_geglu.modeling_geglu import CLASS_PREFIX
from hf_geglu.plan import Plan, SitePlan
from hf_geglu.provenance import Reversal, TrainingRecord
from hf_geglu.variants import VARIANTS


def body(manifest: Manifest, *, name: str, inherited: BaseCard, curves: str | None) -> str:
    """All sections.

    Args:
        manifest: of the variant.
        name: title.
        inherited: what the card of the base says.
        curves: path of a picture of the loss curves in the repository.
    """
    sections = [
        [f"# {name}", "", _summary(manifest, inherited.base_model)],
        _converted(manifest),
        _narrowing(manifest),
        _measured(manifest.trainings, curves),
        _written(manifest.trainings),
        _verification(manifest.provenance.report),
        _loading(manifest, name),
        _limits(manifest),
        _making(manifest, name),
        _licence(manifest, inherited.licence),
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip()


def _summary(manifest: Manifest, origin: str | None) -> str:
    plan, base = manifest.provenance.plan, _base(manifest)
    if origin and manifest.provenance.base.id is None:
        base += f", made from {origin} as its own card says,"
    if plan is None:
        return f"A GeGLU variant of {base}. How it was converted is not recorded."
    blocks = f"{len(plan.converted)} feed-forward blocks"
    how = "exactly: the difference is rounding" if plan.exact else "approximately, within the bounds below"
    if plan.narrows:
        how = "lossy: the blocks have fewer neurons than they had, see below"
    text = f"{base} with its {blocks} converted to {_variant(plan)} ({how})"
    if manifest.trainings:
        steps = sum(run.steps for run in manifest.trainings)
        text += f", then trained for {_steps(steps)}"
    elif manifest.trained:
        text += ", and trained since by other means than hf_geglu's recipes"
    else:
        text += "; not trained since"
    return text + "."


def _steps(count: int) -> str:
    return f"{count:,} step{'s' * (count != 1)}"


def _base(manifest: Manifest) -> str:
    base = manifest.provenance.base
    if base.id:
        return f"[{base.id}](https://huggingface.co/{base.id})" + (f" at `{base.commit[:12]}`" if base.commit else "")
    return f"`{base.name}` (a local folder)" if base.name else "an unnamed model"


def _variant(plan: Plan) -> str:
    names = list(dict.fromkeys(entry.variant for entry in plan.converted))
    return ", ".join(f"`{each}`" for each in names)


def _converted(manifest: Manifest) -> list[str]:
    plan = manifest.provenance.plan
    if plan is None:
        return []
    lines = ["## What was converted", ""]
    kinds: dict[tuple[str, ...], int] = {}
    for entry in plan.converted:
        error = _error(entry)
        site = entry.site
        row = (
            f"{'gated' if site.gated else 'dense'} {site.activation}",
            f"{entry.conversion} -> {entry.variant}",
            f"`{VARIANTS[entry.variant].formula}`",
            f"{site.d_in} x {entry.width} x {site.d_out}",
            error,
        )
        kinds[row] = kinds.get(row, 0) + 1
    head = ("blocks", "were", "became", "value of a neuron (gate z, value v)", "size", "error")
    lines += _table(head, [(str(count), *row) for row, count in kinds.items()])
    added = plan.after.parameters - plan.before.parameters
    lines += [
        "",
        f"Parameters: {plan.total_parameters:,}" + (f" + {added:,}" if added else ", as many as before") + ".",
    ]
    if plan.config_changes:
        changes = ", ".join(f"`{key} = {value}`" for key, value in plan.config_changes.items())
        lines += [f"In the config: {changes}."]
    made = manifest.provenance.reversal
    again = 0 if made is None else len(made.paths)
    if len(plan.unselected) > again:
        lines += [f"Left as they were: {len(plan.unselected) - again} blocks."]
    if made is not None:
        lines += [f"Dense again: {again} blocks whose value branch was constant ({within(made)})."]
    return lines


def _narrowing(manifest: Manifest) -> list[str]:
    """What fewer neurons cost, beside other widths and beside the same treatment without a gate."""
    plan = manifest.provenance.plan
    record = None if plan is None else plan.narrowing
    if record is None:
        return []
    points = [(record.result, "this model, as converted")]
    if record.control is not None:
        points.append((record.control, "dense control: the same treatment, no value branch"))
    points += [
        (point, "closed form only" if point.stage == "closed" else "exact in the weights") for point in record.curve
    ]
    figures = [
        (name, attribute, form)
        for name, attribute, form in (
            ("cosine of embeddings", "cosine", ".4f"),
            ("10-neighbour agreement", "neighbours", ".3f"),
            ("KL (nats/token)", "kl", ".4f"),
            ("delta nll (nats/token)", "delta_nll", "+.4f"),
        )
        if getattr(record.result.fidelity, attribute) is not None
    ]
    rows = [
        (str(point.width), what, *(f"{getattr(point.fidelity, attribute):{form}}" for _, attribute, form in figures))
        for point, what in points
    ]
    return [
        "## What the width cost",
        "",
        f"The blocks had {record.old_width} neurons. This is a change of architecture that loses some of what the base "
        "had learned; measured against the base, on calibration data that was held out:",
        "",
        *_table(("neurons", "model", *(name for name, _, _ in figures)), rows),
    ]


def _error(entry: SitePlan) -> str:
    if entry.fit is not None and entry.fit.error is None:
        return entry.fit.method
    if entry.fit is not None and entry.fitted:  # rounded: a row stands for many blocks
        return f"fitted ({entry.fit.method}), measured {entry.fit.error:.0e} of the output"
    return "exact" if entry.exact else f"at most {entry.scaling.max_error:.1e} a neuron"


def within(made: Reversal) -> str:
    """How constant the value branches were that were collapsed."""
    return f"within {made.tolerance:g} of each neuron's value" if made.tolerance else "exactly"


def _measured(runs: Sequence[TrainingRecord], curves: str | None) -> list[str]:
    if not runs and not curves:
        return []
    lines = ["## Measured", ""]
    for run in runs:
        if not run.ledger:
            lines += [f"{_steps(run.steps)} on {run.data}; nothing was held out, so nothing was measured.", ""]
            continue
        first = run.ledger[0].nll
        kl = any(row.kl is not None for row in run.ledger)
        of_text = all(row.perplexity is not None for row in run.ledger) and run.loss == "nll"
        names = ["perplexity", "nll (nats/token)"] if of_text else [run.loss.replace("_", " ")]
        head = ("model", *names, f"vs {run.ledger[0].name}", *["KL to original"] * kl)
        rows = [
            (
                row.name,
                *([f"{row.perplexity:.2f}"] if of_text else []),
                f"{row.nll:.4f}",
                f"{row.nll - first:+.4f}",
                *(["" if row.kl is None else f"{row.kl:.5f}"] * kl),
            )
            for row in run.ledger
        ]
        lines += _table(head, rows)
        seen = f"{_steps(run.steps)}, {run.tokens:,} training tokens, {run.held_out_tokens:,} held-out tokens"
        lines += ["", f"{seen}; data: {run.data or 'not recorded'}."]
        if run.control:
            lines += ["The control is the unconverted model after the same training on the same batches."]
        lines.append("")
    if curves:
        lines += [f"![Held-out loss]({curves})"]
    return lines


def _written(runs: Sequence[TrainingRecord]) -> list[str]:
    """Indented, so that nothing in them is taken for Markdown or HTML."""
    samples = [sample for run in runs for sample in run.samples]
    if not samples:
        return []
    how = "To the same prompts, from the same random numbers; not chosen. Absolute paths stand by their last part."
    lines = ["## What it writes", "", how, ""]
    for sample in samples:
        for head, text in sample.texts().items():
            first, *more = text.splitlines() or [""]
            lines += [f"    {head + ':':9} {first}".rstrip(), *(f"    {'':9} {line}".rstrip() for line in more)]
        lines.append("")
    return lines


def _verification(report: Mapping[str, Any] | None) -> list[str]:
    if report is None:
        return []
    rows = []
    worst = max((check["max_abs"] for check in report["sites"]), default=None)
    if worst is not None:
        rows.append((f"{len(report['sites'])} blocks, random neurons", "float64", f"{worst:.3g}", "", "", ""))
    for entry in report["comparisons"]:
        kl, nll = entry["kl"], entry["delta_nll"]
        rows.append(
            (
                f"whole model, {entry['output']}",
                entry["dtype"],
                f"{entry['max_abs']:.3g}",
                f"{entry['max_rel']:.3g}",
                "" if kl is None else f"{kl:.3g}",
                "" if nll is None else f"{nll:+.4f}",
            )
        )
    lines = ["## Verification", "", "Before and after the conversion, on the same inputs:", ""]
    lines += _table(("what", "dtype", "largest difference", "relative", "KL (nats/token)", "delta nll"), rows)
    reached = [entry["gradient"] for entry in report["values"] if entry["gradient"] is not None]
    if reached:
        alive = sum(gradient > 0 for gradient in reached)
        lines += ["", f"Value branches that receive gradient: {alive} of {len(report['values'])}."]
    if report["note"]:
        lines += ["", report["note"]]
    return lines


def _loading(manifest: Manifest, name: str) -> list[str]:
    plan = manifest.provenance.plan
    auto = _auto_class(manifest.model_class)
    if manifest.kind == "delta":
        return [
            "## How to load",
            "",
            "This is a plan and the tensors that differ from what it makes; loading converts the base first.",
            *_code(
                f"from transformers import {auto}",
                "from hf_geglu.hub.delta import load_delta  # pip install hf_geglu",
                "",
                f'model = load_delta({auto}, "{name}")',
            ),
        ]
    if plan is not None and plan.tier == "native":
        return [
            "## How to load",
            "",
            "With plain transformers; no plugin and no remote code.",
            *_code(f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{name}")'),
        ]
    return [
        "## How to load",
        "",
        "With the plugin, or without it by the one self-contained file that is in this repository:",
        *_code(
            f"from {'hf_geglu.modeling_geglu' if auto.startswith(CLASS_PREFIX) else 'transformers'} import {auto}",
            "",
            "import hf_geglu  # pip install hf_geglu",
            f'model = {auto}.from_pretrained("{name}")',
            "",
            f'model = {auto}.from_pretrained("{name}", trust_remote_code=True)  # without hf_geglu',
        ),
        "The plain class of transformers refuses it with a sentence that says this.",
    ]


def _auto_class(model_class: str) -> str:
    """The Auto class that gives this class; the class itself where there is none."""
    import transformers

    base = model_class.removeprefix(CLASS_PREFIX)
    model_type = getattr(getattr(getattr(transformers, base, None), "config_class", None), "model_type", "")
    fitting = [name for name, found in auto_classes(model_type).items() if found == base]
    # the old catch-all classes come last
    return min(fitting, key=lambda name: ("PreTraining" in name or "WithLMHead" in name, name), default=model_class)


def _limits(manifest: Manifest) -> list[str]:
    plan = manifest.provenance.plan
    lines = ["## Where it will not run", ""]
    if plan is not None and plan.tier == "native":
        family = plan.model_type or "this architecture"
        lines += [
            "Serving engines with model code of their own may hard-code the activation instead of reading the config. "
            "vLLM's own Llama accepts only `silu` and stops (its Transformers backend, `--model-impl transformers`, "
            "runs the code of transformers instead); llama.cpp's Llama graph has SiLU built in, so a GGUF of a "
            "Llama-like GeGLU may run and be silently wrong. Compare with the golden outputs before serving this "
            f"`{family}` there.",
        ]
    else:
        lines += [
            "Engines with model code of their own (vLLM's built-in classes, llama.cpp) do not know the packed blocks. "
            "Only those that can be told to run the code of transformers, with remote code allowed, can serve this.",
        ]
    return lines


def _making(manifest: Manifest, name: str) -> list[str]:
    lines = ["## How it was made", ""]
    if manifest.command:
        lines += _code(manifest.command, language="")
    versions = ", ".join(f"{package} {version}" for package, version in manifest.versions.items())
    lines += [f"With {versions}."]
    for run in manifest.trainings:
        parts = [
            f"seed {run.seed}" if run.seed is not None else "",
            f"data revision `{run.revision}`" * bool(run.revision),
        ]
        parts += [f"training tokens SHA-256 `{run.data_fingerprint}`" * bool(run.data_fingerprint)]
        parts += [f"{key} {value}" for key, value in run.settings.items()]
        lines += ["", f"Training: {', '.join(part for part in parts if part)}."]
    lines += ["", f"`{MANIFEST}` has the plan, the report and the SHA-256 of every file. To check what is here:"]
    lines += _code(f"hf-geglu verify {name}", f"hf-geglu reproduce {name}", language="")
    return lines


def _licence(manifest: Manifest, licence: Licence) -> list[str]:
    if licence.known:
        return ["## Licence", "", f"That of the base: {licence.license_name or licence.license}."]
    return [
        "## Licence",
        "",
        f"**Unknown.** The card of {_base(manifest)} was not at hand or names none; ask its owners before using this.",
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _code(*lines: str, language: str = "python") -> list[str]:
    return ["", f"```{language}", *lines, "```", ""]
