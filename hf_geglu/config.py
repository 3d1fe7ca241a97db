"""geglu_config: the same architecture with GeGLU blocks, as a config for ``AutoModelFor*.from_config``, untrained.

As everywhere, what a config entry does is found out by building the model (on the meta device, without weights) and
looking.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

from torch import nn

from hf_geglu.declaration import declare_config, site_entry
from hf_geglu.errors import PlanError
from hf_geglu.native import changed_config
from hf_geglu.plan import Plan
from hf_geglu.planning import make_plan
from hf_geglu.sites import find_sites
from hf_geglu.sizing import width_changes
from hf_geglu.skeleton import base_architecture, skeleton
from hf_geglu.variants import VARIANTS, get_variant
from hf_geglu.width import matched_width

NATIVELY_GATED = {
    # T5, LongT5, UDOP... derive the other two entries from the first one, but keep what was derived in a copied config.
    # "gelu_python" is the erf form; "gated-gelu" is read as the tanh form.
    variant: {"feed_forward_proj": f"gated-{name}", "dense_act_fn": activation, "is_gated_act": True}
    for variant, name, activation in (
        ("geglu", "gelu_python", "gelu_python"),
        ("geglu_tanh", "gelu", "gelu_new"),
        ("swiglu", "silu", "silu"),
        ("reglu", "relu", "relu"),
    )
}
"""The one table of this package: config entries that turn a dense architecture into its own gated one. They cannot be
found by looking at a dense model."""


def geglu_config(config: Any, width: Literal["same", "matched"] | int = "same", *, variant: str = "geglu") -> Any:
    """A config whose models have GeGLU blocks where those of `config` have dense or other gated ones.

    Args:
        config: of any transformers model, dense or gated. It is not changed.
        width: "same" intermediate size; "matched" keeps the parameters (two thirds of a dense block's width, the same
            for a block that is gated already); or the intermediate size itself.
        variant: a name of `hf_geglu.VARIANTS`.

    Returns:
        A plain config of the same class where the architecture has gated blocks of its own, otherwise the config of the
        portable variant (``GegluBertConfig``). ``AutoModelFor*.from_config`` takes either.

    Raises:
        VariantError: unknown variant.
        PlanError: `config` is a variant's already, or no entry of it sets that width.
        NoSitesError: the architecture has no FFN block.
    """
    get_variant(variant)
    if hasattr(config, "geglu"):
        raise PlanError(f"this {type(config).__name__} is a GeGLU variant's already; hand in the base model's config")
    model = _on_meta(config)
    native = _natively_gated(config, model, variant)
    if native is not None:
        return _with_width(native, model, width)
    plan = make_plan(model, variant, gelu="named")
    if plan.refused:
        raise PlanError(f"{plan.refused[0].path} cannot become {variant}: {plan.refused[0].reason}")
    if plan.tier == "native":
        return _with_width(changed_config(config, plan.config_changes), model, width)
    return _portable(_with_width(config, model, width), plan)


def _on_meta(config: Any) -> nn.Module:
    return skeleton(config, base_architecture(config))


def _portable(config: Any, plan: Plan) -> Any:
    model = _on_meta(config)
    plan = make_plan(model, plan.variant, gelu="named")
    config = copy.deepcopy(config)
    declare_config(config, type(model), [site_entry(entry, model) for entry in plan.converted], plan)
    return config


def _natively_gated(config: Any, model: nn.Module, variant: str) -> Any | None:
    """The config of the architecture's own gated form, where it has one and the class does what the table says."""
    entries = NATIVELY_GATED.get(variant)
    if entries is None or not all(hasattr(config, key) for key in entries):
        return None
    changed = changed_config(config, entries)
    sites = find_sites(_on_meta(changed)).sites
    gate = VARIANTS[variant].gate
    as_wanted = all(site.gated and site.activation == gate for site in sites)
    return changed if as_wanted and len(sites) == len(find_sites(model).sites) else None


def _with_width(config: Any, model: nn.Module, width: Literal["same", "matched"] | int) -> Any:
    """`config` with another intermediate size, if `width` asks for one."""
    wanted: dict[int, int] = {}
    for site in find_sites(model).sites:
        if width == "same" or (width == "matched" and site.gated):
            wanted[site.width] = site.width
        elif isinstance(width, str):
            if width != "matched":
                raise PlanError(f"width={width!r}; expected 'same', 'matched' or a number of neurons")
            wanted[site.width] = matched_width(site.width)
        elif width < 1:
            raise PlanError(f"width={width}; expected at least one neuron")
        else:
            wanted[site.width] = width
    changes = width_changes(config, model, wanted)
    return changed_config(config, changes) if changes else config
