"""Replays a conversion from its manifest on the base, and compares what comes out with what was saved."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hf_geglu.converting import convert
from hf_geglu.errors import HfGegluError, ManifestError
from hf_geglu.fingerprint import fingerprint
from hf_geglu.hub.fits import read_fits
from hf_geglu.hub.manifest import Manifest, Sealed, read_manifest, sealed_files
from hf_geglu.hub.sources import check_base, fetch_folder, load_base
from hf_geglu.hub.verifying import Check, Verification
from hf_geglu.plan import Plan
from hf_geglu.surgery import Fits

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def reproduce_variant(
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Verification:
    """Load the base, carry out the manifest's plan, save, and compare bit for bit.

    A calibrated conversion is replayed with the numbers that were saved beside the manifest, not calibrated again.
    Of a variant that was trained since, the conversion is replayed and compared by its fingerprint at step 0; the
    training is not, and the result says so.

    Args:
        source: a folder or a Hub id.
        base: the base, where it is not to be taken from the Hub.
        revision: of `source` on the Hub.
        token: for private repositories; the stored login by default.

    Raises:
        ManifestError: no manifest, no plan in it, fits that were not kept, or a base that cannot be had.
        HfGegluError: what the conversion raises.
    """
    folder = fetch_folder(source, revision=revision, token=token)
    manifest = read_manifest(folder)
    plan = manifest.provenance.plan
    if plan is None:
        raise ManifestError(
            f"the manifest of {folder.name} has no plan, so there is nothing to replay; expected a variant that was "
            "saved by save_folder after convert"
        )
    fits = None if plan.narrows else read_fits(folder, plan)
    model = load_base(manifest, base, token=token)
    checks = list(_replay(model, plan, manifest, fits))
    if not plan.narrows and all(check.outcome != "different" for check in checks):
        if manifest.trained or manifest.kind == "delta":
            checks.append(_what_is_not_replayed(manifest))
        else:
            checks += _compare_saved(model, folder, manifest)
    name = folder.resolve().name if os.path.isdir(source) else str(source)
    return Verification(name=f"{name}, converted again", checks=tuple(checks))


def _replay(model: Any, plan: Plan, manifest: Manifest, fits: Fits | None) -> Iterator[Check]:
    difference = check_base(model, manifest)
    if difference:
        yield Check(what="base", outcome="different", detail=difference)
        return
    yield Check(what="base", outcome="ok", detail=f"{manifest.provenance.base.name}: same fingerprint")
    if plan.narrows:
        yield Check(what="conversion", outcome="not checked", detail=_narrowed(plan, manifest))
        return
    try:
        convert(model, plan, fits=fits, verify="sites")
    except HfGegluError as error:
        yield Check(what="conversion", outcome="different", detail=str(error))
        return
    step0 = manifest.provenance.step0
    if step0 is None:
        yield Check(what="step 0", outcome="not checked", detail="the manifest has no fingerprint of it")
        return
    difference = step0.difference(fingerprint(model), bitwise=True)
    yield Check(
        what="step 0",
        outcome="different" if difference else "ok",
        detail=difference or f"{len(plan.converted)} blocks converted again: same fingerprint",
    )


def _narrowed(plan: Plan, manifest: Manifest) -> str:
    detail = (
        "the blocks were made narrower on calibration data, of which the manifest has the SHA-256 and not the text; "
        "their weights are what the manifest seals"
    )
    detail += f" ({plan.calibration})" if plan.calibration is not None else ""
    return detail + (f". To make it again: {manifest.command}" if manifest.command else "")


def _what_is_not_replayed(manifest: Manifest) -> Check:
    runs = [
        f"{run.steps:,} steps on {run.data}" + (f", seed {run.seed}" if run.seed is not None else "")
        for run in manifest.trainings
    ]
    detail = "the conversion can be replayed bit for bit; the training is not replayed"
    detail += f" ({'; '.join(runs)})" if runs else " (it was done by other means than hf_geglu's recipes)"
    if manifest.command:
        detail += f". Its command: {manifest.command}"
    return Check(what="training", outcome="not checked", detail=detail)


def _compare_saved(model: Any, folder: Path, manifest: Manifest) -> Iterator[Check]:
    with tempfile.TemporaryDirectory() as scratch:
        options = {} if manifest.max_shard_size is None else {"max_shard_size": manifest.max_shard_size}
        model.save_pretrained(scratch, **options)
        made = sealed_files(Path(scratch), WEIGHTS)
        told = {name: entry for name, entry in manifest.files.items() if "/" not in name and _is_weights(name)}
        for name in sorted(told.keys() | made.keys()):
            if told.get(name) == made.get(name):
                yield Check(what=name, outcome="ok", detail=f"SHA-256 {made[name].sha256[:12]}..., the same bits")
            else:
                yield _explain(name, told.get(name), made.get(name), folder, Path(scratch))


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _explain(name: str, told: Sealed | None, made: Sealed | None, folder: Path, scratch: Path) -> Check:
    """Other bytes are not yet other weights: say which tensors differ, and by how much."""
    if told is None or made is None:
        where = "only in the replay" if told is None else "only in the manifest"
        return Check(what=name, outcome="different", detail=f"{where}: the weights are cut into other files")
    if not name.endswith(".safetensors") or not (folder / name).is_file():
        return Check(what=name, outcome="different", detail="other content")
    worst, largest, count = "", 0.0, 0
    with safe_open(folder / name, framework="pt") as old, safe_open(scratch / name, framework="pt") as new:
        keys = set(old.keys()) | set(new.keys())
        for key in sorted(keys):
            if key not in old.keys() or key not in new.keys():  # noqa: SIM118 - safe_open is no mapping
                worst, largest, count = key, float("inf"), count + 1
                continue
            a, b = old.get_tensor(key), new.get_tensor(key)
            if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
                distance = float((a.double() - b.double()).abs().max()) if a.shape == b.shape else float("inf")
                count += 1
                if distance >= largest:
                    worst, largest = key, distance
    if not count:
        return Check(what=name, outcome="ok", detail="every tensor has the same bits; the file's header is another")
    detail = f"{count} of {len(keys)} tensors differ, {worst} most: {largest:.3g}"
    return Check(what=name, outcome="different", detail=detail)
