"""One model type: what its feed-forward classes are, and whether its config is obeyed."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from benchmarks.identification.sources import misnamed_gate, opinion
from benchmarks.sweep.forking import Job, Keep
from benchmarks.zoo.building import NotBuiltError, _instance, build
from hf_geglu.identifying import Identity, Unknown, identify
from hf_geglu.identifying.audit import Finding, audit
from hf_geglu.identifying.sited import identities_of_sites
from hf_geglu.sites.find import explore
from hf_geglu.sites.projections import within

FFN_NAME = re.compile(r"MLP|Mlp|FeedForward|FFN|Intermediate|GLU|GatedAct|DenseAct|PositionWise|Experts")
MANY = 12
"""Instances of one class that are looked at before it is given up."""


def identify_type(job: Job, keep: Keep) -> Job:
    """For the forking server."""
    del keep
    row: dict[str, Any] = {"type": job["type"], "classes": [], "findings": [], "skipped": ""}
    try:
        model = build(job["type"]).model
    except NotBuiltError as error:
        return {**row, "skipped": f"not built: {error}"}
    start = time.process_time()
    seen: dict[str, dict[str, Any]] = {}
    found, evidence = explore(model)
    for answer in identities_of_sites(model, found, evidence):  # blocks, whatever their class is called
        block = model.get_submodule(answer.path) if answer.path else model
        _keep(seen, block, answer, job["type"], named=FFN_NAME.search(type(block).__name__) is not None)
    row["elsewhere"] = []
    for module in _named(model):
        if type(module).__module__ != type(model).__module__ and not job.get("all"):
            row["elsewhere"].append(type(module).__name__)  # of another type, which is asked itself
            continue
        name = type(module).__name__
        if any(row["class"] == name and row["known"] and row["named"] for row in seen.values()):
            continue
        for answer in _each(identify(module)):
            _keep(seen, module, answer, job["type"], named=True)
    row["elsewhere"] = sorted(set(row["elsewhere"]) - {one["class"] for one in seen.values()})
    row["classes"] = list(seen.values())
    row["seconds"] = round(time.process_time() - start, 3)
    config, kind = getattr(model, "config", None), type(model)
    composite = config is not None and any(isinstance(one, PretrainedConfig) for one in vars(config).values())
    if composite and job.get("audit") == "plain":
        row["not_audited"] = "not looked at in this run (--audit plain): its config holds others"
    elif config is not None:
        try:
            findings = audit(config, lambda one: _instance(kind, one, "meta"), seen=(model, found))
            row["findings"] = [_with_heads(one, config, kind).to_dict() for one in findings]
        except Exception as error:  # a class that cannot be built from its own saved config
            row["not_audited"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    row["cpu"] = round(time.process_time(), 3)  # of this child, building included
    row["audited"] = round(time.process_time() - start - row["seconds"], 3)
    return row


def _with_heads(finding: Finding, config: Any, kind: type) -> Finding:
    """An entry that nothing in the model follows may be for a class with a head: then it is no lie."""
    if finding.verdict != "ignored" or finding.setting:
        return finding
    module = importlib.import_module(kind.__module__)
    for cls in vars(module).values():
        if inspect.isclass(cls) and cls is not kind and getattr(cls, "config_class", None) is type(config):
            try:
                again = {one.entry: one for one in audit(config, functools.partial(_instance, cls, device="meta"))}
            except Exception:  # some classes are abstract, others want more than a config
                continue
            other = again[finding.entry]  # without blocks of its own, a class says nothing
            if other.verdict == "followed" or (other.verdict == "elsewhere" and other.computed):
                return replace(finding, verdict="elsewhere")
    return finding


def _named(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose class is called like a feed-forward block and that hold a projection or a stack of them."""
    counted: dict[str, int] = {}
    for module in model.modules():
        name = type(module).__name__
        if not FFN_NAME.search(name) or not type(module).__module__.startswith("transformers"):
            continue
        if not within(module) and not any(p is not None and p.ndim > 2 for p in module._parameters.values()):
            continue
        counted[name] = counted.get(name, 0) + 1
        if counted[name] <= MANY:
            yield module


def _each(answer: Any) -> tuple[Identity | Unknown, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


def _keep(
    seen: dict[str, dict[str, Any]], module: nn.Module, answer: Identity | Unknown, model_type: str, *, named: bool
) -> None:
    """One row a class, formula and layout; what is known replaces what is not."""
    name = type(module).__name__
    known = isinstance(answer, Identity)
    told = answer.to_dict()
    key = f"{name}: {told.get('formula')}, {told.get('layout')}"
    if known:
        seen.pop(name, None)
    elif any(row["class"] == name for row in seen.values()):
        key = next(key for key, row in seen.items() if row["class"] == name)
    else:
        key = name
    if key in seen:
        seen[key]["named"] = seen[key]["named"] or named
        return
    said = opinion(module)
    row = {
        "class": name,
        "type": model_type,
        "named": named,
        "known": known,
        "said": sorted(said.activations),
        "said_gated": said.gated,
        **{k: told.get(k) for k in _FIELDS},
    }
    if known:
        row["misnamed"] = misnamed_gate(module, told["gate_half"])
    seen[key] = {k: v for k, v in row.items() if v is not None}


_FIELDS = (
    "family",
    "activation",
    "formula",
    "gelu",
    "layout",
    "gate_half",
    "gate",
    "value",
    "value_offset",
    "gate_bias",
    "value_bias",
    "difference",
    "reason",
    "error",
    "runner_up",
    "runner_up_error",
)
