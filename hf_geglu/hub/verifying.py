"""Is a saved variant what its manifest says? Files by SHA-256, weights by fingerprint, blocks by behaviour, outputs by
golden ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from hf_geglu.errors import HfGegluError, ManifestError
from hf_geglu.files import check_weights
from hf_geglu.fingerprint import fingerprint
from hf_geglu.hub.delta import load_delta
from hf_geglu.hub.golden import check_golden
from hf_geglu.hub.loading import load
from hf_geglu.hub.manifest import GOLDEN, MANIFEST, Manifest, read_manifest, sealed_files
from hf_geglu.hub.sources import fetch_folder
from hf_geglu.sites import find_sites
from hf_geglu.skeleton import architecture

Outcome = Literal["ok", "different", "not checked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of a verification."""

    what: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All that was checked. `ok` where nothing differs."""

    name: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differs from what the manifest says."""
        return all(check.outcome != "different" for check in self.checks)

    @property
    def differences(self) -> tuple[Check, ...]:
        """What differs."""
        return tuple(check for check in self.checks if check.outcome == "different")

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=self.name)
        table.add_column("check")
        table.add_column("result")
        table.add_column("detail", overflow="fold")
        colours = {"ok": "green", "different": "bold red", "not checked": "yellow"}
        for check in self.checks:
            table.add_row(check.what, f"[{colours[check.outcome]}]{check.outcome}[/]", check.detail)
        return table


def verify_variant(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache: Path | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Verification:
    """Check a saved variant against its manifest. Nothing is written but the Hub's cache.

    Args:
        source: a folder or a Hub id.
        revision: branch, tag or commit on the Hub.
        token: for a private repository; the stored login by default.
        cache: folder for what is downloaded; the Hub's by default.
        base: for a delta: the base, where it is not to be taken from the Hub.

    Raises:
        ManifestError: nothing is there, or it has no manifest that can be read.
    """
    folder = fetch_folder(source, revision=revision, token=token, cache=cache)
    manifest = read_manifest(folder)
    checks = list(_check_files(folder, manifest))
    name = folder.resolve().name if os.path.isdir(source) else str(source)
    if any(check.outcome == "different" for check in checks):
        checks.append(Check(what="outputs", outcome="not checked", detail="the files are not those of the manifest"))
        return Verification(name=name, checks=tuple(checks))
    try:
        model = _load(folder, manifest, base)
    except (HfGegluError, ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        checks.append(Check(what="loads", outcome="different", detail=f"{type(error).__name__}: {reason}"))
        return Verification(name=name, checks=tuple(checks))
    checks.append(Check(what="loads", outcome="ok", detail=type(model).__name__))
    checks += [
        _check_weights(model, manifest),
        _check_blocks(model, manifest),
        *_check_outputs(model, folder, manifest),
    ]
    return Verification(name=name, checks=tuple(checks))


def _load(folder: Path, manifest: Manifest, base: str | os.PathLike[str] | None) -> Any:
    if manifest.kind == "delta":
        return load_delta(None, folder, base=base)
    from transformers import AutoConfig

    return load(architecture(AutoConfig.from_pretrained(folder)), folder, dtype="auto")


def _check_files(folder: Path, manifest: Manifest) -> Iterator[Check]:
    if manifest.kind == "model":
        try:
            check_weights(folder)
        except HfGegluError as error:
            yield Check(what="weights files", outcome="different", detail=str(error))
    found = sealed_files(folder)
    for name in sorted(manifest.files.keys() | found.keys()):
        told, here = manifest.files.get(name), found.get(name)
        if told is None:
            yield Check(what=name, outcome="different", detail="is not in the manifest; it was added later")
        elif here is None:
            yield Check(what=name, outcome="different", detail="is in the manifest and not here")
        elif told != here:
            yield Check(
                what=name,
                outcome="different",
                detail=f"SHA-256 {here.sha256[:12]}... of {here.bytes:,} bytes, expected {told.sha256[:12]}... of "
                f"{told.bytes:,}",
            )
        else:
            yield Check(what=name, outcome="ok", detail=f"SHA-256 {here.sha256[:12]}..., {here.bytes:,} bytes")
    if not manifest.files:
        yield Check(what="files", outcome="different", detail=f"{MANIFEST} lists none")


def _check_weights(model: Any, manifest: Manifest) -> Check:
    if manifest.weights is None:
        return Check(what="loaded weights", outcome="not checked", detail="the manifest has no fingerprint of them")
    difference = manifest.weights.difference(fingerprint(model), bitwise=True)
    if difference and manifest.versions.get("transformers") != _transformers_version():
        made = manifest.versions.get("transformers")
        difference += f" (saved with transformers {made}, which may name tensors otherwise)"
    return Check(
        what="loaded weights", outcome="different" if difference else "ok", detail=difference or "same fingerprint"
    )


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


def _check_blocks(model: Any, manifest: Manifest) -> Check:
    """Every converted block computes what the plan says, found out by running it."""
    plan = manifest.provenance.plan
    what = "FFN blocks"
    if plan is None:
        return Check(what=what, outcome="not checked", detail="the manifest has no plan")
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    if body is not model:
        return Check(what=what, outcome="not checked", detail="they carry adapters")
    found = {site.up: site for site in find_sites(model)}
    wrong = [
        entry.site.up
        for entry in plan.converted
        if (site := found.get(entry.site.up)) is None or not site.gated or site.activation != entry.scaling.gate
    ]
    if wrong:
        detail = f"{len(wrong)} of {len(plan.converted)} do not compute {plan.variant}, {wrong[0]} first"
        return Check(what=what, outcome="different", detail=detail)
    return Check(what=what, outcome="ok", detail=f"{len(plan.converted)} of {len(plan.converted)} are {plan.variant}")


def _check_outputs(model: Any, folder: Path, manifest: Manifest) -> Iterator[Check]:
    if manifest.golden is not None:
        yield Check(what="golden outputs", outcome="not checked", detail=f"there are none: {manifest.golden}")
        return
    try:
        compared = check_golden(model, folder / GOLDEN)
    except (ManifestError, ValueError, RuntimeError) as error:
        yield Check(what="golden outputs", outcome="different", detail=str(error).strip().split("\n")[0])
        return
    for check in compared:
        detail = (
            "the same bits"
            if check.identical
            else f"largest difference {check.max_abs:.3g}, another machine's rounding explains {check.allowed:.3g}"
        )
        yield Check(what=f"golden {check.output}", outcome="ok" if check.ok else "different", detail=detail)
