"""The converting side: one model type from its config to a saved variant."""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import hf_geglu
from benchmarks.opinions.comparing import Comparison, compare_on
from benchmarks.sweep.forking import Job, Keep
from benchmarks.sweep.outputs import Tensors, distance, run, says_something
from benchmarks.sweep.row import Row
from benchmarks.sweep.training import train_one_step
from benchmarks.sweep.verdict import UNDECIDED
from benchmarks.zoo.building import NotBuiltError, build
from benchmarks.zoo.inputs import NoInputsError, inputs_for
from hf_geglu.auto import auto_classes
from hf_geglu.plan import Plan
from hf_geglu.sites import FoundSites

TEXT_TOWERS = ("text", "language", "decoder", "llm", "lm", "bert", "thinker")
"""How the part of a composite model that reads text is called, or begins to be called."""


def convert(job: Job, keep: Keep) -> Job:
    """Everything but the reading.

    Args:
        job: `type`, `folder` (where to save), `partial` (whether to save the first block's
            conversion alone too; that of a text tower is always saved).
        keep: see `forking`.

    Returns:
        row: the `Row`, and reads: the jobs for the other side.
    """
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if job.get("original"):
        return save_original(job, keep)
    side = _Side(Row(type=job["type"]), Path(job["folder"]), keep)
    side.work(partial=job["partial"])
    return side.state()


def save_original(job: Job, keep: Keep) -> Job:
    """The model as it is, saved: for what a variant does not survive because its original does not.

    Args:
        job: `type`, `folder`.
        keep: see `forking`.

    Returns:
        reads: the one job for the other side, or none with an error.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    side = _Side(Row(type=job["type"]), Path(job["folder"]), keep)
    model = side._build()
    assert model is not None
    side._save(model, type(model), "native", side._inputs(model), "original")
    return {"reads": side._reads, "error": side.row.save_error}


class _Side:
    """One type on its way. Each stage fills its part of the row; an error ends the stages that need it."""

    def __init__(self, row: Row, folder: Path, keep: Keep) -> None:
        self.row, self._folder, self._keep = row, folder, keep
        self._reads: list[Job] = []

    def state(self) -> Job:
        return {"row": self.row.to_dict(), "reads": self._reads}

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.row.seconds[name] = -1.0  # what a row that crashed was at
        self._keep(self.state())
        start = time.perf_counter()
        try:
            yield
        finally:
            self.row.seconds[name] = round(time.perf_counter() - start, 3)

    def work(self, *, partial: bool) -> None:
        row = self.row
        with self._stage("build"):
            model = self._build()
        if model is None:
            return
        with self._stage("find"):
            found = self._find(model)
        if found is None:
            return
        with self._stage("inputs"):
            inputs = None if row.not_built else self._inputs(model)
        if inputs is not None and any(entry.reason.startswith(UNDECIDED) for entry in found.rejected):
            with self._stage("find with inputs"):
                row.with_inputs = True
                found = self._find(model, inputs)
            if found is None:
                return
        if inputs is not None:
            with self._stage("second opinion"):
                self._second_opinion(model, found, inputs)
        if not found.sites:
            return
        with self._stage("plan"):
            plan = self._plan(model, found)
        if plan is None or row.not_built:
            return
        with self._stage("run"):
            before = None if inputs is None else _wide_run(model, inputs)
            own = None if inputs is None else run(model, inputs)
        original = type(model)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with self._stage("convert"):
            if not self._convert(model, plan, inputs):
                return
        with self._stage("compare"):
            if inputs is not None and before is not None:
                self._compare(model, inputs, before)
        with self._stage("train"):
            self._train(model, plan, inputs)
        with self._stage("save"):
            self._save(model, original, plan.tier, inputs, "all")
        with self._stage("revert"):
            hf_geglu.revert(model)
            row.reverted = _same(weights, model.state_dict()) and (
                own is None or inputs is None or distance(own, run(model, inputs)) == (0.0, 0.0)
            )
        with self._stage("partial"):
            for what, layers in _parts(found, plan, first=partial):
                self._partial(model, what, layers, found, inputs)

    def _build(self) -> nn.Module | None:
        row = self.row
        try:
            built = build(row.type)
        except NotBuiltError as error:
            row.not_built = str(error)
            return None
        row.model_class, row.shrinking = type(built.model).__name__, built.shrinking
        row.device, row.parameters = built.device, built.parameters
        if built.device == "meta":
            row.not_built = f"{built.parameters / 1e6:,.0f} million parameters at its smallest: no weights here"
        return built.model

    def _find(self, model: nn.Module, inputs: Mapping[str, Any] | None = None) -> FoundSites | None:
        try:
            found = hf_geglu.find_sites(model, inputs=inputs)
        except Exception as error:
            self.row.find_error = _said(error)
            return None
        self.row.sites = [
            {
                "up": site.up,
                "block_class": type(model.get_submodule(site.block)).__name__,
                "kind": site.kind,
                "layout": site.layout,
                "activation": site.activation,
                "swappable": site.activation_path is not None,
                "called": site.activation_call is not None,
            }
            for site in found.sites
        ]
        self.row.rejected = [[entry.path, entry.class_name, entry.reason] for entry in found.rejected]
        return found

    def _plan(self, model: nn.Module, found: FoundSites) -> Plan | None:
        """The plan for everything that can be converted; what cannot is on record and left out, as a user would."""
        row = self.row
        try:
            plan = hf_geglu.make_plan(model, found=found)
            row.refused = [[entry.path, entry.reason] for entry in plan.refused]
            if plan.refused:
                plan = hf_geglu.make_plan(model, found=found, layers=[entry.site.up for entry in plan.sites])
        except Exception as error:
            row.plan_error = _said(error)
            return None
        row.tier, row.tier_reason, row.exact = plan.tier, plan.tier_reason, plan.exact
        row.converted, row.kept = 0, len(plan.sites) - len(plan.converted)
        return plan

    def _inputs(self, model: nn.Module) -> Mapping[str, Any] | None:
        try:
            inputs = inputs_for(model, self.row.type)
            if not says_something(run(model, inputs)):
                raise NoInputsError("all outputs are NaN, or there are none")
        except Exception as error:  # a model may have anything against made-up inputs
            self.row.not_run = _said(error)
            return None
        return inputs

    def _second_opinion(self, model: nn.Module, found: FoundSites, inputs: Mapping[str, Any]) -> None:
        comparison = Comparison(type=self.row.type)
        compare_on(comparison, model, found, inputs)
        self.row.second_opinion = not comparison.skipped
        self.row.looked_into = comparison.looked_into
        self.row.comparison = comparison.to_dict()
        self.row.disagreements = [asdict(one) for one in comparison.disagreements]

    def _convert(self, model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None) -> bool:
        row = self.row
        try:
            report = hf_geglu.convert(model, plan, inputs=inputs, verify="sites" if inputs is None else "model")
        except Exception as error:
            row.convert_error = _said(error)
            return False
        row.converted = report.converted
        row.site_error = max((check.max_abs for check in report.sites), default=0.0)
        row.site_bound = max((entry.scaling.max_error for entry in plan.converted), default=0.0)
        row.values = len(plan.converted)
        reached = [value.gradient for value in report.values if value.gradient is not None]
        row.values_reached, row.values_alive = len(reached), sum(gradient > 0 for gradient in reached)
        return True

    def _compare(self, model: nn.Module, inputs: Mapping[str, Any], before: tuple[str, Tensors]) -> None:
        row = self.row
        row.dtype, outputs = before
        try:
            row.max_abs, row.max_rel = distance(outputs, _run_in(model, inputs, row.dtype))
        except Exception as error:
            row.convert_error = f"after the conversion: {_said(error)}"

    def _train(self, model: nn.Module, plan: Plan, inputs: Mapping[str, Any] | None) -> None:
        if inputs is None or not plan.converted:
            return
        try:
            self.row.loss = list(train_one_step(copy.deepcopy(model), inputs))
        except Exception as error:
            self.row.step_error = _said(error)

    def _save(self, model: nn.Module, original: type, tier: str, inputs: Mapping[str, Any] | None, what: str) -> None:
        if tier == "in-memory":
            return
        folder = self._folder / what
        try:
            model.save_pretrained(folder)  # type: ignore[operator]
            _expect(model, inputs, folder)
        except Exception as error:
            self.row.save_error = f"{what}: {_said(error)}"
            return
        model_type = getattr(model.config, "model_type", "").removeprefix("geglu_")  # type: ignore[union-attr]
        heads = auto_classes(model_type)
        mapped = [auto for auto, name in heads.items() if name == original.__name__]
        auto = "AutoModel" if "AutoModel" in mapped else next(iter(mapped), None)
        base = {"folder": str(folder), "what": what, "module": original.__module__, "class": original.__name__}
        if tier == "native":
            self._reads.append({**base, "way": "plain", "auto": auto})
            return
        self._reads.append({**base, "way": "plugin", "auto": auto})
        if auto or not heads:  # auto_map names the class under AutoModel where transformers has no head of that type
            self._reads.append({**base, "way": "remote", "auto": auto or "AutoModel"})

    def _partial(
        self, model: nn.Module, what: str, layers: list[str], found: FoundSites, inputs: Mapping[str, Any] | None
    ) -> None:
        original = type(model)
        try:
            plan = hf_geglu.make_plan(model, found=found, layers=layers)
            hf_geglu.convert(model, plan, inputs=inputs, verify="sites")
        except Exception as error:
            self.row.convert_error = f"{what} only: {_said(error)}"
            return
        self._save(model, original, plan.tier, inputs, what)
        hf_geglu.revert(model)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


def _wide_run(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, Tensors]:
    try:
        return "float64", _run_in(model, inputs, "float64")
    except (RuntimeError, TypeError, ValueError):  # a cast to float32 written into the class
        return "float32", _run_in(model, inputs, "float32")


def _run_in(model: nn.Module, inputs: Mapping[str, Any], dtype: str) -> Tensors:
    wide = getattr(torch, dtype)
    if wide != torch.float32:
        model = copy.deepcopy(model).to(wide)
    return run(
        model,
        {
            name: value.to(wide) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        },
    )


def _same(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def _parts(found: FoundSites, plan: Plan, *, first: bool) -> list[tuple[str, list[str]]]:
    """The `first` block alone if asked for, and the text tower alone where there is another one beside it."""
    ups = [entry.site.up for entry in plan.converted]
    parts = [("first", ups[:1])] if first and len(found.sites) > 1 and ups else []
    text = [up for up in ups if _in_text_tower(up)]
    if text and len(text) < len(found.sites):
        parts.append(("text", text))
    return parts


def _in_text_tower(path: str) -> bool:
    return any(part.startswith(TEXT_TOWERS) for part in path.split(".")[:2])


def _expect(model: nn.Module, inputs: Mapping[str, Any] | None, folder: Path) -> None:
    """What the reading side must find: every tensor of the state and, where it runs, the outputs."""
    target = folder / "expected"
    target.mkdir()
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, target / "state.safetensors")
    if inputs is None:
        return
    tensors = {f"in.{name}": value.contiguous() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    flags = {name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)}
    outputs = {f"out.{name}": tensor.clone().contiguous() for name, tensor in run(model, inputs).items()}
    save_file(tensors | outputs, target / "run.safetensors")
    (target / "flags.json").write_text(json.dumps(flags), encoding="utf-8")
