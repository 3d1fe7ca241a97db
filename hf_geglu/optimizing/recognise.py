"""Is this block ``down(dropout(activation(gate(x)) * value(x)))`` and nothing else? Found out by running it.

The finder has seen which projections feed which. Before a kernel takes the place of a `forward`, the block is run on
noise beside the composition of its own parts, in evaluation and in training mode from one random state: where dropout
stands is part of the answer. Then the kernel is run beside it too.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from dataclasses import replace

import torch
from torch import nn

from hf_geglu.modeling_geglu import PackedGLU, get_attribute
from hf_geglu.modes import in_mode
from hf_geglu.ops import Form, Mode, packed_glu, split
from hf_geglu.ops.formulas import FORMULAS
from hf_geglu.optimizing.plain import hooked, not_plain
from hf_geglu.optimizing.running import BlockRecipe, UnitRecipe, kind_of, run_block
from hf_geglu.sites import Site
from hf_geglu.sites.signature import Signatures

TOKENS = 4

SAME_PARTS = 8
"""Rounding steps by which the composition of a block's own parts may differ from its `forward`, relative to the largest
output: they run the same operations, but perhaps the product in another order."""

OTHER_ORDER = 64
"""The same for the kernels, which sum in another order."""


def block_recipe(
    model: nn.Module, site: Site, mode: Mode, known: dict[Hashable, BlockRecipe | str]
) -> BlockRecipe | str:
    """The recipe of a site's block, or the reason why there is none. Blocks of one signature are run once; `known` is
    what that showed."""
    why = _no_block(site)
    if why is not None:
        return why
    block = model.get_submodule(site.block)
    prefix = f"{site.block}." if site.block else ""
    gate, up, down = (path.removeprefix(prefix) for path in (site.gate, site.up, site.down))
    outside = activation_of(model, site)
    if not outside.startswith(prefix):
        return f"its activation, {outside}, is outside the block"
    activation = outside.removeprefix(prefix)
    why = next(filter(None, (not_plain(block.get_submodule(path)) for path in (gate, up, down))), None)
    why = why or _dispatched(block) or _other_parts(block, {gate, up, down}, activation)
    if why is not None:
        return why
    recipe = BlockRecipe(
        gate=None if site.layout in ("packed", "interleaved") else gate,
        up=up,
        down=down,
        activation=activation,
        activation_kind=kind_of(get_attribute(block, activation)),
        form=_form(site),
        argument=next(iter(inspect.signature(block.forward).parameters), ""),
        width=site.width,
        mode=mode,
    )
    signature = (recipe, Signatures().of(block), next(block.parameters()).dtype)
    if signature not in known:
        known[signature] = _verified(block, recipe, site.d_in)
    return known[signature]


def activation_of(model: nn.Module, site: Site) -> str:
    """Path of what the block calls as its activation: the unit of a variant, whose gate activation the finder saw."""
    path = site.activation_path
    assert path is not None
    owner = path.rpartition(".")[0]
    return owner if isinstance(model.get_submodule(owner), PackedGLU) else path


def unit_recipe(model: nn.Module, site: Site, mode: Mode) -> UnitRecipe | str:
    """The recipe of a packed unit alone, or the reason why there is none."""
    holder = None if site.activation_path is None else get_attribute(model, activation_of(model, site))
    if not isinstance(holder, PackedGLU):
        return "its activation and its product are not in one module"
    if holder.dim != -1 or holder.groups != 1:
        return "its unit is packed in another dimension than the last"
    if site.activation not in FORMULAS:
        return f"there is no kernel for {site.activation}"
    if hooked(holder):
        return "its unit has a hook, which must be called"
    form = Form(activation=site.activation, layout="packed", offset=float(holder.offset))
    packed_P = _noise(model.get_submodule(site.block), 2 * site.width)
    with torch.no_grad():
        expected_F, answer_F = type(holder).forward(holder, packed_P), packed_glu(packed_P, form, backend="eager")
    if not _close(answer_F, expected_F, OTHER_ORDER):
        return f"its unit does not compute {site.activation} * value"
    return UnitRecipe(activation_kind=kind_of(holder.activation), form=form, mode=mode)


def _no_block(site: Site) -> str | None:
    """What of a site says already that its block is not one of those."""
    if site.kind == "experts":
        return "experts in one parameter: their class brings kernels of its own"
    if site.kind == "conv" or site.projection not in ("linear", "conv1d"):
        return "a convolution"
    if site.kind == "split":
        return "its projections are in two modules, with other steps around the second"
    if site.kind == "inline":
        return "its projections are called by a layer that does more"
    if site.activation not in FORMULAS:
        return f"there is no kernel for {site.activation}"
    if site.activation_path is None:
        return "its activation can be watched nowhere"
    if site.limit is not None:
        return "it clamps its branches"
    return None


def _form(site: Site) -> Form:
    return Form(
        activation=site.activation,
        layout="separate" if site.layout == "separate" else "interleaved" if site.layout == "interleaved" else "packed",
        gate_half=site.gate_half or "first",
        transposed=site.projection == "conv1d",
        offset=site.value_offset,
    )


def _dispatched(block: nn.Module) -> str | None:
    """Whether somebody else has put a `forward` in the place of its own, or only the meta device knows its weights."""
    if "forward" in block.__dict__:
        return "its forward has been replaced already"
    if any(parameter.is_meta for parameter in block.parameters()):
        return "it has no weights (meta device)"
    return None


def _other_parts(block: nn.Module, projections: set[str], activation: str) -> str | None:
    """What else the block is made of."""
    for path, module in block.named_modules():
        known = path == "" or path in projections or path == activation or path.startswith(f"{activation}.")
        if not known and not isinstance(module, (nn.Dropout, nn.Identity)):
            return f"it holds a {type(module).__name__} too"
    if block._parameters or block._buffers:
        return "it has parameters of its own"
    return None


def _verified(block: nn.Module, recipe: BlockRecipe, d_in: int) -> BlockRecipe | str:
    dropouts = [path for path, module in block.named_modules() if type(module) is nn.Dropout]
    x_D = _noise(block, d_in)
    forward = type(block).forward
    for candidate in _placements(recipe, dropouts):
        if all(_same_forward(block, candidate, x_D, training=training) for training in (False, True)):
            with in_mode(block, training=False), torch.no_grad():
                answer_D, expected_D = run_block(block, candidate, x_D, "lean", backend="eager"), forward(block, x_D)
            if _close(answer_D, expected_D, OTHER_ORDER):
                return candidate
    return "it does something else than down(activation(gate) * value), or its parts have different dtypes"


def _placements(recipe: BlockRecipe, dropouts: list[str]) -> Iterator[BlockRecipe]:
    """Every place where the block's dropouts could stand; those that do nothing need none."""
    nowhere = (None, *dropouts)
    for between in nowhere:
        for after in nowhere:
            if between is None or between != after:
                idle = tuple(path for path in dropouts if path not in (between, after))
                yield replace(recipe, between=between, after=after, idle=idle)


def _same_forward(block: nn.Module, recipe: BlockRecipe, x_D: torch.Tensor, *, training: bool) -> bool:
    """Whether the composition of the block's parts answers as the block does, from the same random state."""
    devices = [x_D.device] if x_D.is_cuda else []
    answers = []
    with in_mode(block, training=training), torch.no_grad():
        for run in (lambda: type(block).forward(block, x_D), lambda: _composed(block, recipe, x_D)):
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                try:
                    answers.append(run())
                except Exception:  # somebody else's code, or parts that do not fit together
                    return False
    return isinstance(answers[0], torch.Tensor) and _close(answers[1], answers[0], SAME_PARTS)


def _composed(block: nn.Module, recipe: BlockRecipe, x_D: torch.Tensor) -> torch.Tensor:
    up, activation = block.get_submodule(recipe.up), get_attribute(block, recipe.activation)
    if isinstance(activation, PackedGLU):
        hidden_F: torch.Tensor = activation(up(x_D))
    else:
        branches = (
            split(up(x_D), recipe.form) if recipe.gate is None else (block.get_submodule(recipe.gate)(x_D), up(x_D))
        )
        hidden_F = activation(branches[0]) * (branches[1] + recipe.form.offset)
    for path in (recipe.between, recipe.down, recipe.after):
        hidden_F = hidden_F if path is None else block.get_submodule(path)(hidden_F)
    return hidden_F


def _noise(block: nn.Module, width: int) -> torch.Tensor:
    weight = next(block.parameters())
    x = torch.randn((1, TOKENS, width), generator=torch.Generator().manual_seed(0))
    return x.to(weight.device, weight.dtype)


def _close(answer: torch.Tensor, expected: torch.Tensor, steps: int) -> bool:
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        return False
    largest = expected.abs().max()
    return bool((answer - expected).abs().max() <= steps * torch.finfo(expected.dtype).eps * largest)
