"""`comparing.compare` as a job of the forking server."""

from __future__ import annotations

import warnings

import torch
import transformers

from benchmarks.opinions.comparing import compare
from benchmarks.sweep.forking import Job, Keep


def compare_type(job: Job, keep: Keep) -> Job:
    """Both opinions on `type`."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    keep({"type": job["type"], "skipped": "crashed"})
    return compare(job["type"]).to_dict()
