"""`hf_geglu.optimize`: kernels in every gated block of a model, and out again."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from torch import nn

from hf_geglu.errors import KernelError
from hf_geglu.modeling_geglu import get_attribute
from hf_geglu.ops import MODES, Mode
from hf_geglu.ops.choose import packing_pays
from hf_geglu.ops.decode import bytes_of, packable
from hf_geglu.optimizing.attention import install_attention, remove_attention
from hf_geglu.optimizing.norms import norm_recipes
from hf_geglu.optimizing.recognise import activation_of, block_recipe, unit_recipe
from hf_geglu.optimizing.report import OptimizationReport, Runs, SiteOps
from hf_geglu.optimizing.running import STATE, BlockRecipe, UnitRecipe, install, remove, weights_of
from hf_geglu.sites import Site, find_sites


def optimize(model: nn.Module, *, ops: Mode = "auto", decode: bool = False) -> OptimizationReport:
    """Run the gated FFN blocks of `model` by fused kernels: variants of ours and every gated model that `find_sites`
    understands; what surrounds them in a training step, RMS norms and causal attention, likewise. Weights,
    state_dict, config and what `save_pretrained` writes stay as they are; other models of the same class are not
    touched.

    A block whose projections are hooked, wrapped (LoRA), quantised, sharded, exported or differentiated by torch.func
    runs its own `forward`, at every call where that is so.

    Args:
        model: changed in place: its blocks get another `forward`. Copies of it keep that.
        ops: "auto" takes at every call what is cheapest there, the module's own `forward` included. "lean" saves x,
            gate and value for the backward pass, always. "tiled" saves x alone and computes gate and value again, a
            tile of tokens at a time. "reference" takes everything out again.
        decode: keep a second copy of the blocks' weights, packed for oneDNN, and run calls of up to 64 tokens on a CPU
            by it where no gradient is wanted (generation). Made at the second such call, dropped when training begins
            or a weight changes, in no saved file and no copy; the report says how many bytes it takes.

    Returns:
        For every site what runs there and, where it is not the whole block, why not.

    Raises:
        KernelError: an unknown `ops`; `decode` with "reference". Nothing was changed.
    """
    if ops not in MODES:
        raise KernelError(f"unknown ops={ops!r}; expected one of: {', '.join(MODES)}")
    if decode and ops == "reference":
        raise KernelError(
            'decode=True is for optimised blocks, and ops="reference" takes them out; expected one or the other'
        )
    for module in list(model.modules()):
        if STATE in module.__dict__:
            remove(module)
    remove_attention(model)
    found = find_sites(model).sites
    entries: list[SiteOps] = []
    known: dict[Hashable, BlockRecipe | str] = {}
    for site in found:
        runs, reason, recipe, path = _decide(model, site, ops, known)
        held, unpacked = 0, ""
        if recipe is not None:
            module = get_attribute(model, path) if path else model
            if decode and isinstance(recipe, BlockRecipe):
                held, unpacked = _packing(module, recipe, site.d_in)
                recipe = replace(recipe, decode=not unpacked)
            install(module, recipe)
        entries.append(SiteOps(path=site.block, runs=runs, reason=reason, packed_bytes=held, unpacked=unpacked))
    norms = {} if ops == "reference" else norm_recipes(model)
    for module, norm in norms.items():
        install(module, norm)
    attentions = 0 if ops == "reference" else install_attention(model)
    return OptimizationReport(
        model_class=type(model).__name__,
        ops=ops,
        sites=tuple(entries),
        norms=len(norms),
        attentions=attentions,
        decode=decode,
    )


def _packing(block: nn.Module, recipe: BlockRecipe, hidden: int) -> tuple[int, str]:
    """Bytes that a packed copy of a block's weights takes; or why there will be none."""
    weights = weights_of(block, recipe)
    why = packable(weights)
    if why is None and not packing_pays(1, hidden, recipe.width):
        why = "too small for packed weights to be quicker"
    return (bytes_of(weights), "") if why is None else (0, why)


def _decide(
    model: nn.Module, site: Site, mode: Mode, known: dict[Hashable, BlockRecipe | str]
) -> tuple[Runs, str, BlockRecipe | UnitRecipe | None, str]:
    """What runs at a site, why not more, its recipe, and the path of the module that gets it."""
    if mode == "reference":
        return "module", "kernels are off", None, ""
    if not site.gated:
        return "module", "a dense block, with no product in it; hf_geglu.convert makes it a gated one", None, ""
    block = block_recipe(model, site, mode, known)
    if isinstance(block, BlockRecipe):
        return "block", "", block, site.block
    unit = unit_recipe(model, site, mode)
    if isinstance(unit, UnitRecipe):
        return "unit", block, unit, activation_of(model, site)
    return "module", block if site.activation_path is None else f"{block}; {unit}", None, ""
