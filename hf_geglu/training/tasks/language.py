"""Causal and masked language modelling: text in blocks."""

from __future__ import annotations

from hf_geglu.training.data.corpus import load_corpus
from hf_geglu.training.objectives.objective import objective_for
from hf_geglu.training.tasks.kind import Prepared, Request, TaskKind


def _causal(request: Request) -> Prepared:
    objective = objective_for("clm", request.processor)
    return Prepared(
        objective,
        load_corpus(request.data, request.processor, task="clm", block_size=request.block_size, seed=request.seed),
    )


def _masked(request: Request) -> Prepared:
    objective = objective_for("mlm", request.processor, mlm_probability=request.data.mlm_probability)
    return Prepared(
        objective,
        load_corpus(request.data, request.processor, task="mlm", block_size=request.block_size, seed=request.seed),
    )


CLM = TaskKind("clm", "the next token", "AutoModelForCausalLM", "a causal model", _causal, writes=True)
MLM = TaskKind("mlm", "hidden tokens", "AutoModelForMaskedLM", "a masked language model", _masked)
