"""The card of a model that was a variant and is dense again: what it is, and whether it is its base bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_geglu.hub.card import CARD, OURS_BESIDE, is_ours, marked
from hf_geglu.hub.card_text import within
from hf_geglu.hub.licence import BaseCard
from hf_geglu.provenance import Provenance, Reversal


def write_collapsed_card(
    folder: Path, made: Reversal, provenance: Provenance, *, inherited: BaseCard, name: str
) -> Path:
    """Write it, beside one that a person wrote.

    Args:
        folder: of the saved model.
        made: the collapse.
        provenance: of the variant before it.
        inherited: what the base's card says.
        name: for the title.
    """
    from huggingface_hub import ModelCardData

    base, licence = provenance.base, inherited.licence
    trained = bool(provenance.trainings) or not _is_base(made, provenance)
    more: dict[str, Any] = {"base_model_relation": "finetune"} if base.id and trained else {}
    data = ModelCardData(
        base_model=base.id,
        language=inherited.language,
        library_name="transformers",
        license=licence.license,
        license_name=licence.license_name,
        license_link=licence.license_link,
        pipeline_tag=inherited.pipeline_tag,
        tags=["hf_geglu"],
        **more,
    )
    target = folder / (CARD if is_ours(folder / CARD) else OURS_BESIDE)
    target.parent.mkdir(exist_ok=True)
    target.write_text(marked(data, "\n".join(_lines(made, provenance, name))), encoding="utf-8")
    return target


def _is_base(made: Reversal, provenance: Provenance) -> bool:
    told = provenance.base.fingerprint
    return told is not None and not told.difference(made.after, bitwise=True)


def _lines(made: Reversal, provenance: Provenance, name: str) -> list[str]:
    base = f"`{provenance.base.name}`" if provenance.base.name else "an unnamed model"
    count = len(made.paths)
    lines = [
        f"# {name}",
        "",
        f"A GeGLU variant of {base} whose {count} converted feed-forward blocks were made dense again by "
        f"`hf-geglu collapse`: every value branch was constant ({within(made)}). It has the class and the config of "
        "its base and loads with plain transformers.",
        "",
    ]
    if provenance.base.fingerprint is None:
        lines.append("Whether its weights are those of the base is not known: no fingerprint of it was at hand.")
    elif _is_base(made, provenance):
        lines.append("Its weights are those of the base, bit for bit (by fingerprint).")
    else:
        steps = sum(run.steps for run in provenance.trainings)
        by = f" ({steps:,} steps as a variant)" if steps else ""
        lines.append(f"Its weights are others than those of the base{by}.")
    lines += ["", *_measured(made.report)]
    return lines


def _measured(report: Any) -> list[str]:
    lines = ["Before and after the collapse, on the same inputs:", ""]
    worst = max((check["max_abs"] for check in report["sites"]), default=0.0)
    lines += ["| what | dtype | largest difference |", "|---|---|---|"]
    lines.append(f"| {len(report['sites'])} blocks, random neurons | float64 | {worst:.3g} |")
    for entry in report["comparisons"]:
        lines.append(f"| whole model, {entry['output']} | {entry['dtype']} | {entry['max_abs']:.3g} |")
    return lines
