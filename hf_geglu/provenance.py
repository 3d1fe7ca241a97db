"""Where a converted model comes from: kept on the model from `convert` on, for the manifest that is saved with it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_geglu.fingerprint import Fingerprint
from hf_geglu.plan import Plan, Untouched
from hf_geglu.surgery import Fits

_KEY = "_hf_geglu_provenance"
_FITS = "_hf_geglu_fits"
_REVERSAL = "_hf_geglu_reversal"
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that was converted.

    Attributes:
        id: on the Hub; None for a local folder.
        name: the id, or the last component of the folder (never its path); None where nothing is known.
        commit: of the Hub repository.
        fingerprint: of its weights before the conversion.
    """

    id: str | None = None
    name: str | None = None
    commit: str | None = None
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """One model on the held-out data.

    Attributes:
        name: "original", "step 0", "step 500", "control, step 500"...
        nll: mean negative log-likelihood, nats per predicted token, or what the record's `loss` says.
        perplexity: exp(nll) of tokens; None of anything else.
        kl: KL(original || this model), nats per token, where it was measured.
    """

    name: str
    nll: float
    perplexity: float | None
    kl: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What models wrote to one prompt.

    Attributes:
        prompt: as a person reads it.
        before: by the converted model, untrained.
        after: by the trained one.
        control: by the unconverted model after the same training, where there is one.
    """

    prompt: str
    before: str
    after: str
    control: str | None = None

    def texts(self) -> dict[str, str]:
        """By what they are."""
        found = {"prompt": self.prompt, "before": self.before, "after": self.after}
        return found if self.control is None else found | {"control": self.control}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """One training of a variant.

    Attributes:
        task: "clm", "mlm"...
        steps: optimizer steps.
        tokens: that went through the model.
        seed: of data order, dropout and masks.
        data: name of the dataset, as a reader knows it.
        dataset_id: on the Hub, None for local files.
        revision: of the dataset, where it has one.
        data_fingerprint: SHA-256 of the training tokens in order, where they are all at hand.
        settings: what the result depends on.
        ledger: base, step 0, final, control: as far as measured.
        held_out_tokens: behind each row.
        control: whether the last row is the unconverted model after the same training.
        samples: what was written to prompts before and after.
        loss: what `nll` of the ledger is: "nll" of tokens, "cross_entropy" of classes, "mse" of a regression.
    """

    task: str
    steps: int
    tokens: int
    seed: int | None = None
    data: str | None = None
    dataset_id: str | None = None
    revision: str | None = None
    data_fingerprint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    ledger: tuple[LedgerRow, ...] = ()
    held_out_tokens: int = 0
    control: bool = False
    samples: tuple[Sample, ...] = ()
    loss: str = "nll"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reversal:
    """What was collapsed: converted blocks that are dense again.

    Attributes:
        paths: of their up projections, as in the plan of the conversion.
        whole: no converted block is left.
        tolerance: within which value branches counted as constant; 0 for exactly.
        before: fingerprint of the variant before.
        after: fingerprint of what came out.
        report: what was measured (of the last collapse, where there were several), as plain JSON types.
        trained: whether the variant had other weights than its conversion made; None where that is not known.
    """

    paths: tuple[str, ...]
    whole: bool
    tolerance: float
    before: Fingerprint
    after: Fingerprint
    report: Mapping[str, Any]
    trained: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """How a model became a variant.

    Attributes:
        base: what it was.
        plan: what was done; None for a variant that was made from a config (`geglu_config`), or whose plan is lost.
        report: what was measured then, as plain JSON types.
        step0: fingerprint right after the conversion.
        trainings: since then, oldest first, as far as this package did them.
        reversal: what was collapsed since; `plan` and `step0` are then those of the blocks that are left.
    """

    base: Base
    plan: Plan | None = None
    report: Mapping[str, Any] | None = None
    step0: Fingerprint | None = None
    trainings: tuple[TrainingRecord, ...] = ()
    reversal: Reversal | None = None

    def after(self, training: TrainingRecord | None) -> Provenance:
        """With one training more."""
        return self if training is None else replace(self, trainings=(*self.trainings, training))

    def without(self, made: Reversal) -> Provenance:
        """With those blocks dense again."""
        trained = None if self.step0 is None else bool(self.step0.difference(made.before, bitwise=True))
        plan = self.plan
        if plan is not None:
            gone = [entry.site for entry in plan.sites if entry.site.up in made.paths]
            left = tuple(entry for entry in plan.sites if entry.site not in gone)
            reason = "converted, and collapsed again: its value branch was constant"
            dense = (Untouched(path=site.up, activation_path=site.activation_path, reason=reason) for site in gone)
            plan = replace(plan, sites=left, unselected=(*plan.unselected, *dense))
        return replace(
            self,
            plan=plan,
            step0=made.after if trained is False else None,
            reversal=replace(made, trained=trained),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Provenance:
        """Frozen: a copied model shares it."""
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A pickled model comes without it, so that a process without this package can read a native one."""
        return type(None), ()


def base_of(config: Any, fingerprint: Fingerprint | None = None) -> Base:
    """What a config knows of the checkpoint that it was loaded from."""
    named = str(getattr(config, "_name_or_path", "") or "")
    commit = getattr(config, "_commit_hash", None)
    cached = _SNAPSHOT.search(named)
    if cached:
        hub_id = f"{cached['owner']}/{cached['name']}"
        return Base(id=hub_id, name=hub_id, commit=cached["commit"], fingerprint=fingerprint)
    if not named or os.path.exists(named) or not _HUB_ID.fullmatch(named):
        return Base(name=Path(named).resolve().name if named else None, fingerprint=fingerprint)
    return Base(id=named, name=named, commit=commit or _only_snapshot(named), fingerprint=fingerprint)


def cached_commit(hub_id: str, revision: str | None, cache: str | Path | None = None) -> str | None:
    """The commit that a revision stands for in the Hub's cache on this machine, where its config.json is there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json", revision=revision, cache_dir=cache)
    match = _SNAPSHOT.search(found) if isinstance(found, str) else None
    return match["commit"] if match else None


def _only_snapshot(hub_id: str) -> str | None:
    """transformers 5 does not say which commit it loaded. Where the cache holds a single one, it was that."""
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    held = [path.parent.name for path in snapshots.glob("*/config.json")]
    return held[0] if len(held) == 1 else None


def remember(model: nn.Module, provenance: Provenance) -> None:
    """Keep it on the model; a copy of the model keeps it too."""
    model.__dict__[_KEY] = provenance


def remember_fits(model: nn.Module, fits: Fits) -> None:
    """Keep what a plan's fits are made of; shared with copies of the model, which may be trained further."""
    model.__dict__[_FITS] = _Kept(fits)


def recall_fits(model: nn.Module) -> Fits | None:
    """What `remember_fits` kept."""
    found = model.__dict__.get(_FITS)
    return found.fits if isinstance(found, _Kept) else None


def forget(model: nn.Module) -> None:
    """Drop what `remember` and `remember_fits` kept."""
    model.__dict__.pop(_KEY, None)
    model.__dict__.pop(_FITS, None)


@dataclass(frozen=True, slots=True)
class _Kept:
    fits: Fits

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        """Frozen: a copied model shares it."""
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A pickled model comes without it."""
        return type(None), ()


def recall(model: nn.Module) -> Provenance | None:
    """What `remember` kept; None for a model that was not converted in this process."""
    found = model.__dict__.get(_KEY)
    assert found is None or isinstance(found, Provenance)
    return found


def reversal(model: nn.Module) -> Reversal | None:
    """What of this model was collapsed in this process."""
    found = model.__dict__.get(_REVERSAL)
    assert found is None or isinstance(found, Reversal)
    return found


def set_reversal(model: nn.Module, made: Reversal | None) -> None:
    """Keep it on the model, or take it off."""
    model.__dict__.pop(_REVERSAL, None)
    if made is not None:
        model.__dict__[_REVERSAL] = made
