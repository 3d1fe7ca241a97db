"""Carries a conversion out: shards, papers and the other files, then the proof, then the name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_geglu.checkpoint.blueprint import Blueprint
from hf_geglu.checkpoint.calibrating import Result
from hf_geglu.checkpoint.carry import Belongings, carry
from hf_geglu.checkpoint.job import Job
from hf_geglu.checkpoint.layout import Shard, index_json
from hf_geglu.checkpoint.proof import Files, Proof, Verify, prove
from hf_geglu.checkpoint.stream import write_shards
from hf_geglu.files.folder import check_output
from hf_geglu.files.weights import INDEX
from hf_geglu.fingerprint import fingerprint as fingerprint_of
from hf_geglu.hub.papers import write_papers
from hf_geglu.provenance import Provenance, base_of
from hf_geglu.verify import Report

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while shards are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All that is to be done."""

    folder: Path
    papers: Path
    """Where config, generation config and modelling code of the variant are."""
    drawn: Blueprint
    found: Result | None
    """What a calibration decided."""
    shards: tuple[Shard, ...]
    files: Belongings
    verify: Verify
    document: Callable[[Work, Path, Proof], None] | None


def carry_out(work: Work, job: Job, overwrite: bool, progress: Progress | None) -> tuple[Report, int]:
    """Do it; returns the report and how many shards were there already."""
    if job.begin():
        files = Files(source=work.folder, written=job.place.target, shards=work.shards)
        return _proved(work, files).report, len(job.shards)
    check_output(job.place.target, overwrite=overwrite)
    folder, pending = job.place.folder, job.pending()
    job.check_room(pending)
    total, left = (sum(shard.nbytes for shard in some) for some in (work.shards, pending))
    write_shards(pending, folder, _counter(total, left, progress))
    made = [path.name for path in sorted(work.papers.iterdir())]
    carry(work.papers, folder, tuple(made))
    index = index_json(work.shards, sum(parameter.numel() for parameter in work.drawn.variant.parameters()))
    if index is not None:
        (folder / INDEX).write_text(index, encoding="utf-8")
        made.append(INDEX)
    carry(work.folder, folder, work.files.carried)
    job.sweep([*made, *work.files.carried])
    proof = _proved(work, Files(source=work.folder, written=folder, shards=work.shards))
    if work.document is not None:
        work.document(work, folder, proof)
    job.finish()
    return proof.report, len(job.shards) - len(pending)


def _proved(work: Work, files: Files) -> Proof:
    """The proof, with what the calibration has to say."""
    proof = prove(work.drawn, files, work.verify)
    if work.found is None:
        return proof
    note = "; ".join(filter(None, [proof.report.note, *work.found.notes]))
    return replace(proof, report=replace(proof.report, note=note, held_out=work.found.held_out))


def documented(command: Sequence[str], name: str, max_shard_size: int | str) -> Callable[[Work, Path, Proof], None]:
    """Manifest and card, as `save_folder` writes them; golden outputs where the model was in memory for its proof."""

    def document(work: Work, folder: Path, proof: Proof) -> None:
        if not work.drawn.plan.converted:
            return
        step0 = None if proof.variant is None else fingerprint_of(proof.variant)
        base = base_of(work.drawn.base.config, proof.base)
        provenance = Provenance(base=base, plan=work.drawn.plan, report=proof.report.to_dict(), step0=step0)
        write_papers(
            folder,
            provenance,
            model=proof.variant,
            model_class=type(work.drawn.variant).__name__,
            command=command,
            max_shard_size=max_shard_size,
            name=name,
            base_folder=work.folder,
            fits=work.drawn.fits,
        )

    return document


def _counter(total: int, left: int, progress: Progress | None) -> Callable[[int], None]:
    lock, done = threading.Lock(), total - left

    def count(written: int) -> None:
        nonlocal done
        with lock:
            done += written
            if progress is not None:
                progress(done, total)

    return count
