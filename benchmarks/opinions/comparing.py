"""The two opinions on one model, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_geglu
from benchmarks.opinions.graph import Block, read_graph
from benchmarks.sweep.outputs import run
from benchmarks.zoo.building import NotBuiltError, build
from benchmarks.zoo.inputs import inputs_for
from hf_geglu.sites import FoundSites, Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """One block on which they differ."""

    block_class: str
    """The smallest module that holds all its weights; resolutions are kept by this name."""
    opinion: str
    """finder only, graph only, or other weights (both see a block, not the same one)."""
    down: str
    finder: str
    """What the finder says: the weights of its site, or its rejection."""
    graph: str
    """What the graph says."""


@dataclass(slots=True, kw_only=True)
class Comparison:
    """One model type."""

    type: str
    skipped: str = ""
    """Why there is no second opinion: not built, or the whole model cannot be run."""
    agreed: int = 0
    unreached: int = 0
    """Sites whose weights the forward did not use: the graph has no opinion on them."""
    classes: list[str] = field(default_factory=list)
    """Block classes on which both agree."""
    unreached_classes: list[str] = field(default_factory=list)
    looked_into: list[str] = field(default_factory=list)
    """Classes of modules, all of whose projections the forward used: what they hold, the graph has seen."""
    disagreements: list[Disagreement] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def compare(model_type: str) -> Comparison:
    """Both opinions on the zoo's model of a type."""
    comparison = Comparison(type=model_type)
    try:
        built = build(model_type)
    except NotBuiltError as error:
        comparison.skipped = f"not built: {error}"
        return comparison
    if built.device == "meta":
        comparison.skipped = "no weights"
        return comparison
    model = built.model
    try:
        inputs = inputs_for(model, model_type)
    except Exception as error:  # whatever a model has against made-up inputs
        comparison.skipped = f"not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return comparison
    compare_on(comparison, model, hf_geglu.find_sites(model, inputs=inputs), inputs)
    return comparison


def compare_on(comparison: Comparison, model: nn.Module, found: FoundSites, inputs: Mapping[str, Any]) -> None:
    """Both opinions on a model that can be run, into `comparison`. Every parameter receives gradients from then on."""
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        reading = read_graph(model, run(model, inputs, gradients=True))
    except Exception as error:  # a model that cannot be run with gradients
        comparison.skipped = f"not run with gradients: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return
    names = _canonical(model)
    sites = {_weights(model, site, names)[1]: site for site in found.sites}
    blocks = {block.down: block for block in reading.blocks}
    for down in dict.fromkeys([*sites, *blocks]):
        _judge(comparison, model, found, sites.get(down), blocks.get(down), reading.used, names)
    comparison.looked_into = _looked_into(model, reading.used, names)
    comparison.classes = sorted(set(comparison.classes))
    comparison.unreached_classes = sorted(set(comparison.unreached_classes))


def _judge(
    comparison: Comparison,
    model: nn.Module,
    found: FoundSites,
    site: Site | None,
    block: Block | None,
    used: set[str],
    names: dict[int, str],
) -> None:
    ups, down = _weights(model, site, names) if site is not None else (block.ups, block.down)  # type: ignore[union-attr]
    block_class = _common_class(model, [*ups, down])
    if site is not None and block is not None and ups == block.ups:
        comparison.agreed += 1
        comparison.classes.append(block_class)
    elif site is not None and block is None and not ups | {down} <= used:
        comparison.unreached += 1
        comparison.unreached_classes.append(block_class)
    else:
        opinion = "finder only" if block is None else "graph only" if site is None else "other weights"
        finder = f"{', '.join(sorted(ups))} -> {down}" if site is not None else _rejection(found, down)
        graph = (
            "" if block is None else f"{', '.join(sorted(block.ups))} -> {down} by {', '.join(sorted(block.functions))}"
        )
        comparison.disagreements.append(
            Disagreement(block_class=block_class, opinion=opinion, down=down, finder=finder, graph=graph)
        )


def _looked_into(model: nn.Module, used: set[str], names: dict[int, str]) -> list[str]:
    """Classes of which every instance has used all its projections that the graph can see (it leaves convolutions
    over positions out), and of which there are any."""
    reached: dict[str, bool] = {}
    for module in model.modules():
        weights = [
            names[id(one.weight)]
            for one in module.modules()
            if isinstance(one, nn.Linear | nn.modules.conv._ConvNd | Conv1D)
            and one is not module
            and id(one.weight) in names
            and all(size == 1 for size in one.weight.shape[2:])
        ]
        if weights:
            name = type(module).__name__
            reached[name] = reached.get(name, True) and used.issuperset(weights)
    return sorted(name for name, all_used in reached.items() if all_used)


def _canonical(model: nn.Module) -> dict[int, str]:
    """One name for each parameter, however many it goes by."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _weights(model: nn.Module, site: Site, names: dict[int, str]) -> tuple[frozenset[str], str]:
    def name(path: str) -> str:
        for candidate in (f"{path}.weight", path):
            parent, _, attribute = candidate.rpartition(".")
            try:
                parameter = getattr(model.get_submodule(parent), attribute)
            except AttributeError:
                continue
            if id(parameter) in names:
                return names[id(parameter)]
        return path

    return frozenset({name(site.gate), name(site.up)}), name(site.down)


def _common_class(model: nn.Module, parameters: list[str]) -> str:
    parts = [name.split(".")[:-1] for name in parameters]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    module = model.get_submodule(".".join(common))
    while isinstance(module, nn.ModuleList | nn.Sequential | nn.Linear) and common:
        common.pop()
        module = model.get_submodule(".".join(common))
    return type(module).__name__


def _rejection(found: FoundSites, down: str) -> str:
    """The innermost rejection around a weight."""
    around = [entry for entry in found.rejected if not entry.path or down.startswith(f"{entry.path}.")]
    innermost = max(around, key=lambda entry: len(entry.path), default=None)
    return "nothing" if innermost is None else f"rejected {innermost.class_name}: {innermost.reason}"
