"""The manifest: how a saved variant came to be, and the SHA-256 of its files, as JSON beside the weights.

It lies in a folder of its own, `geglu/`: loaders such as vLLM's take every ``*.safetensors`` at the root of a
repository for weights, and the golden outputs are none.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_geglu.errors import ManifestError, PlanError
from hf_geglu.fingerprint import Fingerprint
from hf_geglu.hub.privacy import scrubbed
from hf_geglu.plan import Plan
from hf_geglu.provenance import Base, LedgerRow, Provenance, Reversal, Sample, TrainingRecord

SCHEMA = 1
FOLDER = "geglu"
MANIFEST = f"{FOLDER}/manifest.json"
GOLDEN = f"{FOLDER}/golden.safetensors"

SEALED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "modeling_geglu.py",
    "adapter/*",
    f"{FOLDER}/*.safetensors",
)
"""The files whose SHA-256 a manifest has: they decide which network a loader gets. Tokenizer and card may be edited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """A file that must not change."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is known of a saved variant. Holds no tensors, no absolute path, no name of a machine.

    Attributes:
        kind: "model", or "delta" for a plan with the tensors that differ from step 0.
        model_class: of the saved model.
        provenance: base, plan, report, fingerprint at step 0.
        weights: fingerprint of what was saved; None for a checkpoint that was never in memory.
        command: that made it, if a command did.
        max_shard_size: the largest weights file, as it was asked for.
        versions: of the packages at work.
        files: SHA-256 by path in the folder.
        golden: None where golden outputs are there, otherwise why they are not.
    """

    kind: str = "model"
    model_class: str
    provenance: Provenance
    weights: Fingerprint | None = None
    command: str | None = None
    max_shard_size: str | int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Sealed] = field(default_factory=dict)
    golden: str | None = None

    @property
    def trainings(self) -> tuple[TrainingRecord, ...]:
        """Each training since the conversion that this package knows of, oldest first."""
        return self.provenance.trainings

    @property
    def trained(self) -> bool:
        """Whether the weights are others than the conversion made."""
        made = self.provenance.reversal
        if self.trainings or (made is not None and made.trained):
            return True
        step0 = self.provenance.step0
        return step0 is not None and self.weights is not None and bool(step0.difference(self.weights, bitwise=True))

    def to_json(self) -> str:
        """As JSON text; `from_json` gives an equal manifest back, except for what `privacy.scrub` took out."""
        plan = self.provenance.plan
        data = {"schema": SCHEMA, **asdict(self)}
        data["provenance"]["plan"] = None if plan is None else plan.to_dict()
        return json.dumps(scrubbed(data), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            ManifestError: it is something else, or of a newer version.
        """
        try:
            data = json.loads(text)
            schema = data.pop("schema")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ManifestError(
                f"{MANIFEST} cannot be read ({error!r}); expected JSON that hf_geglu wrote. Download it again"
            ) from error
        if not isinstance(schema, int) or schema > SCHEMA:
            raise ManifestError(
                f"{MANIFEST} has schema {schema!r}, this version reads up to {SCHEMA}; upgrade with pip install -U "
                "hf_geglu"
            )
        try:
            return cls(
                **{
                    **data,
                    "provenance": _provenance(data["provenance"]),
                    "weights": _fingerprint(data["weights"]),
                    "files": {name: Sealed(**entry) for name, entry in data["files"].items()},
                }
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ManifestError(
                f"{MANIFEST} cannot be read ({error}); it was edited, or written by another version of hf_geglu"
            ) from error


def _provenance(data: Mapping[str, Any]) -> Provenance:
    base = data["base"]
    plan = data["plan"]
    return Provenance(
        base=Base(**{**base, "fingerprint": _fingerprint(base["fingerprint"])}),
        plan=None if plan is None else Plan.from_json(json.dumps(plan)),
        report=data["report"],
        step0=_fingerprint(data["step0"]),
        trainings=tuple(_training(entry) for entry in data["trainings"]),
        reversal=_reversal(data.get("reversal")),
    )


def _reversal(data: Mapping[str, Any] | None) -> Reversal | None:
    if data is None:
        return None
    prints = {name: Fingerprint.from_dict(data[name]) for name in ("before", "after")}
    return Reversal(**{**data, **prints, "paths": tuple(data["paths"])})


def _fingerprint(data: Mapping[str, Any] | None) -> Fingerprint | None:
    return None if data is None else Fingerprint.from_dict(data)


def _training(data: Mapping[str, Any]) -> TrainingRecord:
    ledger = tuple(LedgerRow(**row) for row in data["ledger"])
    samples = tuple(Sample(**row) for row in data.get("samples", ()))
    return TrainingRecord(**{**data, "ledger": ledger, "samples": samples})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        ManifestError: there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ManifestError(
            f"{folder.name} has no {MANIFEST}, so nothing says what it should be; expected a variant that "
            "hf_geglu.save_folder, `hf-geglu convert` or `hf-geglu finetune` wrote. For a folder that save_pretrained "
            "made, `hf-geglu document` writes one"
        )
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, PlanError) as error:
        raise ManifestError(f"{MANIFEST} cannot be read: {error}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest; the caller has hashed the files (`sealed_files`)."""
    path = folder / MANIFEST
    path.parent.mkdir(exist_ok=True)
    path.write_text(manifest.to_json(), encoding="utf-8")


def sealed_files(folder: Path, patterns: Sequence[str] = SEALED) -> dict[str, Sealed]:
    """SHA-256 and size of every file of a folder that decides which network a loader gets."""
    found: Iterable[Path] = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {
        path.relative_to(folder).as_posix(): Sealed(sha256=sha256_of(path), bytes=path.stat().st_size) for path in found
    }


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of the packages whose arithmetic and file formats a saved variant depends on."""
    import safetensors
    import torch
    import transformers

    import hf_geglu

    return {
        "hf_geglu": hf_geglu.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }
