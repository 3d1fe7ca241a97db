"""The model card, filled from the manifest: nothing in it is typed by hand, and no number that was not measured."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_geglu.hub.card_text import body
from hf_geglu.hub.licence import BaseCard
from hf_geglu.hub.manifest import FOLDER, Manifest
from hf_geglu.provenance import TrainingRecord

CARD = "README.md"
OURS_BESIDE = f"{FOLDER}/card.md"
"""Where our card goes if a person wrote one."""
CURVES = f"{FOLDER}/loss.png"

_MARK = re.compile(r"\n<!-- written by hf_geglu, sha256 (?P<digest>[0-9a-f]{64}) -->\n*\Z")


def write_card(folder: Path, manifest: Manifest, *, inherited: BaseCard, name: str) -> Path:
    """Write the card of a variant. A card that a person wrote or edited stays; ours then goes beside it.

    Args:
        folder: of the variant.
        manifest: of the variant.
        inherited: what its base's card says.
        name: of the variant, for the title.

    Returns:
        Where the card was written.
    """
    target = folder / (CARD if is_ours(folder / CARD) else OURS_BESIDE)
    target.parent.mkdir(exist_ok=True)
    target.write_text(card(manifest, inherited=inherited, name=name, curves=(folder / CURVES).is_file()), "utf-8")
    return target


def is_ours(path: Path) -> bool:
    """Whether a card is one that we wrote and nobody has touched since, or is not there at all."""
    if not path.is_file():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    found = _MARK.search(text)
    return found is not None and _digest(text[: found.start()]) == found["digest"]


def card(manifest: Manifest, *, inherited: BaseCard, name: str, curves: bool = False, tags: Sequence[str] = ()) -> str:
    """The card as text: metadata, body, and the mark by which we know it again."""
    data = metadata(manifest, inherited=inherited, name=name, tags=tags)
    return marked(data, body(manifest, name=name, inherited=inherited, curves=CURVES if curves else None))


def marked(data: Any, body_text: str) -> str:
    """Metadata and body as a card that we know again."""
    from huggingface_hub import ModelCard

    text = f"---\n{data.to_yaml()}\n---\n\n{body_text}"
    text = str(ModelCard(text)).rstrip() + "\n"  # parsed once: metadata that cannot be read back would fail here
    return f"{text}\n<!-- written by hf_geglu, sha256 {_digest(text)} -->\n"


def metadata(manifest: Manifest, *, inherited: BaseCard, name: str, tags: Sequence[str] = ()) -> Any:
    """The YAML head (huggingface.co/docs/hub/model-cards)."""
    from huggingface_hub import ModelCardData

    base, licence = manifest.provenance.base, inherited.licence
    results = list(_results(manifest)) or None
    more: dict[str, Any] = {}
    if base.id and manifest.kind == "delta":
        more["base_model_relation"] = "adapter"
    elif base.id and manifest.trained:
        more["base_model_relation"] = "finetune"  # at step 0 it is none of the four relations that the Hub knows
    return ModelCardData(
        base_model=base.id,
        language=inherited.language,
        library_name="transformers",
        license=licence.license,
        license_name=licence.license_name,
        license_link=licence.license_link,
        pipeline_tag=inherited.pipeline_tag or pipeline_tag(manifest.model_class),
        tags=list(dict.fromkeys([*_tags(manifest), *tags])),
        datasets=list(dict.fromkeys(run.dataset_id for run in manifest.trainings if run.dataset_id)) or None,
        model_name=name if results else None,
        eval_results=results,
        **more,
    )


_PIPELINES = {
    "CausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "ImageClassification": "image-classification",
    "SpeechSeq2Seq": "automatic-speech-recognition",
}
"""Ending of a class's name -> the Hub's pipeline tag, where the one follows from the other."""


def pipeline_tag(model_class: str) -> str | None:
    """What the head is for, if its name says it."""
    bare = model_class.removesuffix("Model") if model_class.endswith("LMHeadModel") else model_class
    return next(
        (tag for ending, tag in _PIPELINES.items() if bare.endswith(ending) or model_class.endswith(ending)), None
    )


def _tags(manifest: Manifest) -> Iterator[str]:
    plan = manifest.provenance.plan
    yield "hf_geglu"
    yield "geglu" if plan is None else plan.variant
    if plan is not None and plan.tier == "portable" and manifest.kind == "model":
        yield "custom_code"


def _results(manifest: Manifest) -> Iterator[Any]:
    """For model-index: the last training's final row, nothing else describes the weights that are here."""
    from huggingface_hub import EvalResult

    if not manifest.trainings:
        return
    run = manifest.trainings[-1]
    final = final_row(run)
    if final is None or run.data is None:
        return
    task = {"clm": "text-generation", "sft": "text-generation", "mlm": "fill-mask"}.get(run.task)
    if task is None:
        return
    for metric, value in (("perplexity", final.perplexity), ("nll", final.nll)):
        yield EvalResult(
            task_type=task,
            dataset_type=run.dataset_id or "local",
            dataset_name=f"{run.data}, held out ({run.held_out_tokens:,} tokens)",
            dataset_revision=run.revision,
            metric_type=metric,
            metric_name=metric if metric == "perplexity" else "negative log-likelihood, nats per token",
            metric_value=round(value, 6),
        )


def final_row(run: TrainingRecord) -> Any:
    """The trained variant's row of a ledger; None where it was not measured."""
    rows = run.ledger[:-1] if run.control else run.ledger
    return rows[-1] if rows else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
