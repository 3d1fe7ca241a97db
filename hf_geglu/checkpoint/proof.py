"""Was the conversion what its plan promised? Looked up in the files that were written, not in what was meant to be."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hf_geglu.checkpoint.blueprint import Blueprint
from hf_geglu.checkpoint.layout import Shard
from hf_geglu.checkpoint.memory import free_memory, needed_to_run
from hf_geglu.checkpoint.stored import Stored, span
from hf_geglu.conversions import Coefficients
from hf_geglu.conversions.precision import Factor
from hf_geglu.converting import compare_run, first_run, noise_of
from hf_geglu.distance import cast
from hf_geglu.fingerprint import Fingerprint, fingerprint
from hf_geglu.modeling_geglu import expose_activation, get_attribute, set_attribute
from hf_geglu.plan import SitePlan
from hf_geglu.sites.site import Projection, Site
from hf_geglu.sites.weights import bias_name, is_stack, output_dim, weight_name
from hf_geglu.surgery import Undo
from hf_geglu.verify import Report, SiteCheck, check_exactness, check_sites, check_values

Verify = Literal["auto", "model", "sites", "none"]

NEURONS = 128
"""How many neurons of a block are compared; a model in memory affords more."""

PIECE = 2**22
"""Bytes that are read at a time where a neuron's numbers do not lie together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The two folders to compare, and what was written."""

    source: Path
    written: Path
    shards: Sequence[Shard]

    @contextmanager
    def opened(self, name: str) -> Iterator[Stored]:
        """A tensor that was written."""
        shard, entry = next((shard, entry) for shard in self.shards for entry in shard.entries if entry.name == name)
        handle = os.open(self.written / shard.name, os.O_RDONLY)
        try:
            yield span(shard.name, handle, len(shard.head), entry)
        finally:
            os.close(handle)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was measured; the model and fingerprints where the whole model was run."""

    report: Report
    variant: nn.Module | None = None
    base: Fingerprint | None = None


def prove(drawn: Blueprint, files: Files, verify: Verify) -> Proof:
    """Measure as much as was asked for.

    "sites" reads the rows of the neurons that are checked. "model" also loads the original, then the variant, and runs
    both; it needs memory for one of them at a time. "auto" is "model" where that much memory is free.

    Raises:
        VerificationError: the plan's promise is not kept.
    """
    plan = drawn.plan
    report = Report(
        model_class=plan.model_class,
        variant=plan.variant,
        tier=plan.tier,
        exact=plan.exact,
        converted=len(plan.converted),
        comparisons=(),
        sites=(),
        values=(),
        response=None,
        note="" if plan.converted else f"every selected block is {plan.variant} already; nothing was changed",
    )
    if verify == "none" or not plan.converted:
        return Proof(report=report if report.note else replace(report, note="not verified (verify='none')"))
    whole = [entry for entry in plan.converted if _is_whole(entry, drawn)]
    notes = [] if len(whole) == len(plan.converted) else ["blocks that are stored in parts were not checked one by one"]
    if verify == "auto":
        needed, free = needed_to_run(drawn.variant, _dtype(drawn)), free_memory()
        verify = "model" if needed <= free else "sites"
        if verify == "sites":
            notes.append(
                f"the whole model was not run, which takes about {needed:,} bytes of memory; {free:,} are free"
            )
    sites = tuple(_check_site(entry, drawn, files) for entry in whole)
    report = replace(report, sites=sites, note="; ".join(notes))
    return Proof(report=report) if verify == "sites" else _with_model(report, drawn, files)


def _dtype(drawn: Blueprint) -> torch.dtype:
    config: Any = drawn.base.config
    return config.dtype or torch.float32


def _is_whole(entry: SitePlan, drawn: Blueprint) -> bool:
    return all(
        weight_name(path, entry.site.projection) in drawn.parameters for path in (entry.site.gate, entry.site.up)
    )


def _check_site(entry: SitePlan, drawn: Blueprint, files: Files) -> SiteCheck:
    """`verify.check_sites` on one site, cut down to a few of its neurons: only their numbers are read."""
    site = entry.site
    neurons = torch.randperm(site.width, generator=torch.Generator().manual_seed(0))[:NEURONS].sort().values
    cut = replace(entry, site=replace(site, width=len(neurons)))
    old: dict[str, nn.Parameter | None] = {}
    meta: dict[str, Any] = {}
    try:
        for path in dict.fromkeys((site.gate, site.up)):
            for name in (weight_name(path, site.projection), bias_name(path, site.projection)):
                if name not in drawn.names:
                    continue
                dim = output_dim(site.projection) if name == weight_name(path, site.projection) else -1
                with files.opened(drawn.names[name]) as written:
                    new = sample(written, site.projection, dim, _outputs(site, neurons, packed=not site.gated))
                stored = drawn.parameters.get(name)
                before = (
                    None
                    if stored is None
                    else sample(stored, site.projection, dim, _outputs(site, neurons)).to(new.dtype)
                )
                old[name] = None if before is None else nn.Parameter(before, requires_grad=False)
                meta[name] = get_attribute(drawn.variant, name)
                set_attribute(drawn.variant, name, nn.Parameter(new, requires_grad=False))
        fits = {}
        fit = drawn.fits.get(site.up)
        if isinstance(fit, Coefficients):
            fits[site.up] = _cut(fit, neurons)
            down = weight_name(site.down, site.projection)
            if fit.left is not None:
                outputs = torch.randperm(site.d_out, generator=torch.Generator().manual_seed(0))[:NEURONS].sort().values
                dim = output_dim(site.projection)
                with files.opened(drawn.names[down]) as written:
                    new = sample(written, site.projection, dim, outputs)
                before = sample(drawn.parameters[down], site.projection, dim, outputs).to(new.dtype)
                old[down] = nn.Parameter(before, requires_grad=False)
                meta[down] = get_attribute(drawn.variant, down)
                set_attribute(drawn.variant, down, nn.Parameter(new, requires_grad=False))
                fits[site.up] = replace(fits[site.up], left=fit.left[outputs], right=fit.right)
        _exposed(drawn.variant, site)
        activations = {site.up: _exposed(drawn.base, site)}
        undo = Undo(plan=replace(drawn.plan, sites=(cut,)), fits=fits, parameters=old, activations=activations)
        return check_sites(drawn.variant, undo)[0]
    finally:
        for name, parameter in meta.items():
            set_attribute(drawn.variant, name, parameter)


def _cut(fit: Coefficients, neurons_N: torch.Tensor) -> Coefficients:
    """The lines of those neurons; of a stack, of its first and its last expert, as `sample` takes them."""

    def pick(factor: Factor) -> Factor:
        if not isinstance(factor, torch.Tensor):
            return factor
        ends = sorted({0, len(factor) - 1})
        return factor[ends][:, neurons_N] if factor.dim() == 2 else factor[neurons_N]

    return Coefficients(a=pick(fit.a), b=pick(fit.b), alpha=pick(fit.alpha), beta=pick(fit.beta))


def _exposed(model: nn.Module, site: Site) -> Any:
    """The activation of a site; where `forward` calls a function, the attribute that then holds it is made first."""
    assert site.activation_path is not None
    owner, _, name = site.activation_path.rpartition(".")
    module = model.get_submodule(owner)
    if site.activation_call is not None and not hasattr(module, name):
        expose_activation(module, site.activation_call)
    return get_attribute(model, site.activation_path)


def _outputs(site: Site, neurons_N: torch.Tensor, *, packed: bool = False) -> torch.Tensor:
    """Positions of those neurons among the outputs of a projection, in order, so that a cut keeps its layout."""
    if site.layout == "interleaved":
        return torch.stack([2 * neurons_N, 2 * neurons_N + 1], dim=1).flatten()
    if packed or site.layout == "packed":
        return torch.cat([neurons_N, neurons_N + site.width])
    return neurons_N


def sample(stored: Stored, projection: Projection, dim: int, positions_N: torch.Tensor) -> torch.Tensor:
    """Those entries of a stored tensor along `dim`; of a stack, for the first and the last expert."""
    dim, rows = dim % len(stored.shape), stored.shape[0]
    if dim == 0:
        return torch.cat([stored.rows(n, n + 1) for n in positions_N.tolist()])
    step = 1 if is_stack(projection) else max(1, PIECE * rows // max(1, stored.nbytes))
    starts = sorted({0, rows - 1}) if is_stack(projection) else range(0, rows, step)
    pieces = (stored.rows(start, min(start + step, rows)) for start in starts)
    return torch.cat([piece.index_select(dim, positions_N) for piece in pieces])


def _with_model(report: Report, drawn: Blueprint, files: Files) -> Proof:
    original = _load(type(drawn.base), files.source, _dtype(drawn))
    before, inputs, note = first_run(original, None)
    base = fingerprint(original)
    del original
    gc.collect()
    variant = _load(type(drawn.variant), files.written, _dtype(drawn))
    if inputs is None:
        note = "; ".join(filter(None, [report.note, note]))
        return Proof(report=replace(report, note=note), variant=variant, base=base)
    comparisons = tuple(compare_run(variant, kind, outputs, inputs) for kind, outputs in before.items())
    check_exactness(drawn.plan, comparisons, noise_of(before))
    values, response = check_values(variant, drawn.plan, cast(inputs, variant))
    measured = replace(report, comparisons=comparisons, values=values, response=response)
    return Proof(report=measured, variant=variant, base=base)


def _load(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    model: nn.Module = kind.from_pretrained(folder, dtype=dtype)
    return model
