"""The papers of a variant: golden outputs, manifest, card. Written into a folder that holds the saved model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from hf_geglu.errors import ManifestError
from hf_geglu.fingerprint import Fingerprint, fingerprint
from hf_geglu.hub.card import CARD, CURVES, OURS_BESIDE, is_ours, write_card
from hf_geglu.hub.collapsed import write_collapsed_card
from hf_geglu.hub.fits import FITS, read_fits, write_fits
from hf_geglu.hub.golden import write_golden
from hf_geglu.hub.licence import BaseCard, Licence, base_card, card_data, copy_licence_files, inherits
from hf_geglu.hub.manifest import (
    GOLDEN,
    MANIFEST,
    Manifest,
    read_manifest,
    sealed_files,
    versions,
    write_manifest,
)
from hf_geglu.hub.privacy import command_line
from hf_geglu.provenance import Base, Provenance, TrainingRecord, base_of, recall, recall_fits, reversal
from hf_geglu.surgery import Fits


def write_papers(
    folder: Path,
    provenance: Provenance,
    *,
    model: nn.Module | None = None,
    model_class: str | None = None,
    kind: Literal["model", "delta"] = "model",
    command: Sequence[str] = (),
    max_shard_size: str | int | None = None,
    name: str | None = None,
    base_folder: Path | None = None,
    curves: Path | None = None,
    fits: Fits | None = None,
) -> Manifest:
    """Write golden outputs, manifest and card of a variant that was saved in `folder`.

    Args:
        folder: holds config and weights.
        provenance: base, plan, report, trainings: what is known.
        model: the saved model; without one (a checkpoint that was never in memory) there are no golden outputs.
        model_class: name of the saved class, where `model` is not given or is wrapped.
        kind: of the artefact.
        command: words of the command that made it, as in `sys.argv`.
        max_shard_size: that the weights were saved with.
        name: for the card's title; the folder's by default.
        base_folder: where the base lies, if it is a local folder: its card and licence files are read there.
        curves: a PNG of the loss curves.
        fits: what the plan's fits are made of.

    Returns:
        The manifest.
    """
    write_fits(folder, fits)
    missing: str | None = "the checkpoint was converted file by file, the model was never in memory"
    weights: Fingerprint | None = None
    if model is not None:
        model_class = model_class or type(model).__name__
        missing = write_golden(model, folder / GOLDEN)
        weights = fingerprint(model)
    if model_class is None:
        raise ManifestError("neither model nor model_class was given; expected one of them, to say what was saved")
    if curves is not None:
        (folder / CURVES).parent.mkdir(exist_ok=True)
        (folder / CURVES).write_bytes(curves.read_bytes())
    if base_folder is not None:
        copy_licence_files(base_folder, folder)
    manifest = Manifest(
        kind=kind,
        model_class=model_class,
        provenance=provenance,
        weights=weights,
        command=command_line(command) or None,
        max_shard_size=max_shard_size,
        versions=versions(),
        files=sealed_files(folder),
        golden=missing,
    )
    write_manifest(folder, manifest)
    inherited = base_card(provenance.base, base_folder)
    write_card(folder, read_manifest(folder), inherited=inherited, name=name or folder.name)
    return manifest


def document(
    model: nn.Module,
    folder: Path,
    *,
    training: TrainingRecord | None = None,
    command: Sequence[str] = (),
    max_shard_size: str | int | None = None,
    name: str | None = None,
    curves: Path | None = None,
) -> Manifest | None:
    """`write_papers` for a model in memory, with what the model knows of itself.

    Args:
        model: converted in this process, or loaded from a folder or repository that has a manifest.
        folder: where it was saved.
        training: since it was converted or loaded.
        command: see `write_papers`, as for the rest.
        max_shard_size: see there.
        name: see there.
        curves: see there.

    Returns:
        The manifest; None for a model that is no variant as far as anyone can tell, which gets no papers. One that was
        collapsed as a whole gets a card.
    """
    provenance = known_provenance(model)
    if provenance is None:
        made, before = reversal(model), _origin(model)
        if made is not None and before is not None:
            inherited = base_card(before.base, source_folder(model))
            write_collapsed_card(folder, made, before, inherited=inherited, name=name or folder.name)
        return None
    return write_papers(
        folder,
        provenance.after(training),
        model=model,
        command=command,
        max_shard_size=max_shard_size,
        name=name,
        base_folder=source_folder(model),
        curves=curves,
        fits=known_fits(model),
    )


def known_fits(model: nn.Module) -> Fits | None:
    """What the plan's fits are made of: from the conversion in this process, or from beside the manifest that the model
    was loaded with. None where nothing was fitted, or nothing is known of it."""
    fits = recall_fits(model)
    if fits is not None or recall(model) is not None:
        return fits
    manifest = _source_manifest(model)
    plan = None if manifest is None else manifest.provenance.plan
    if plan is None or not any(entry.fitted for entry in plan.converted):
        return None
    try:
        folder = source_folder(model) or _download(model, FITS).parent.parent
        return read_fits(folder, plan)
    except (ManifestError, OSError, ValueError):  # saved without them; the copy will say so too
        return None


def known_provenance(model: nn.Module) -> Provenance | None:
    """Where a model comes from: from its conversion in this process, or from the manifest beside the weights that it
    was loaded from. A portable variant without either is one of unknown provenance; None for any other model, also one
    that was collapsed as a whole."""
    made = reversal(model)
    if made is not None and made.whole:
        return None
    provenance = _origin(model)
    return provenance if provenance is None or made is None else provenance.without(made)


def _origin(model: nn.Module) -> Provenance | None:
    provenance = recall(model)
    if provenance is not None:
        return provenance
    manifest = _source_manifest(model)
    if manifest is not None:
        return manifest.provenance
    return Provenance(base=Base()) if hasattr(getattr(model, "config", None), "geglu") else None


def source_folder(model: nn.Module) -> Path | None:
    """The local folder that a model was loaded from, if it was one."""
    named = _name_or_path(model)
    return Path(named) if named and os.path.isdir(named) else None


def _name_or_path(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _source_manifest(model: nn.Module) -> Manifest | None:
    folder = source_folder(model)
    if folder is not None:
        return read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if not _name_or_path(model):
        return None
    try:
        path = _download(model, MANIFEST)
    except (OSError, ValueError):  # a base, or no network: nothing is known, which the card then says
        return None
    return read_manifest(path.parent.parent)


def _download(model: nn.Module, name: str) -> Path:
    """One file of the repository that a model was loaded from."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(_name_or_path(model), name, revision=base_of(model.config).commit))


def amend(
    folder: Path,
    *,
    training: TrainingRecord | None = None,
    name: str | None = None,
    licence: Licence | None = None,
    curves: Path | None = None,
) -> Manifest:
    """Replace what became known later: the last training's record (with its control), the name, the licence.

    Golden outputs and weights stay as they are. A card that a person wrote or edited stays too.

    Args:
        folder: of the variant.
        training: takes the place of the last one.
        name: for the card; the folder's by default.
        licence: of the base, where its card does not name one.
        curves: a PNG of the loss curves, in place of the one that is there.
    """
    manifest = read_manifest(folder)
    if curves is not None:
        (folder / CURVES).write_bytes(curves.read_bytes())
    if training is not None:
        trainings = (*manifest.trainings[:-1], training)
        manifest = replace(manifest, provenance=replace(manifest.provenance, trainings=trainings))
        write_manifest(folder, manifest)
    inherited = inherited_by(folder)
    if licence is not None:
        inherited = replace(inherited, licence=licence)
    write_card(folder, manifest, inherited=inherited, name=name or folder.name)
    return manifest


def inherited_by(folder: Path) -> BaseCard:
    """What the card of a folder has inherited already."""
    for place in (OURS_BESIDE, CARD):
        path = folder / place
        if path.is_file() and (place == OURS_BESIDE or is_ours(path)):
            return inherits(card_data(path.read_text(encoding="utf-8")))
    return BaseCard()
