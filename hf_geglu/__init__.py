"""Turn the FFN blocks of a pretrained transformers model into GeGLU blocks without breaking it.

``import hf_geglu`` registers the GLU variants in ``ACT2FN`` and the variants' model types in the Auto classes. Both are
idempotent, cheap, and done once transformers has imported those tables; everything else is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_geglu import neighbours
from hf_geglu.errors import HfGegluError
from hf_geglu.neighbours.hooks import when_imported
from hf_geglu.variants import VARIANTS, Variant

if TYPE_CHECKING:
    from hf_geglu.checkpoint import convert_checkpoint
    from hf_geglu.collapsing import CollapseReport, collapse
    from hf_geglu.config import geglu_config
    from hf_geglu.converting import convert
    from hf_geglu.distance import Comparison, compare
    from hf_geglu.hub.loading import from_pretrained
    from hf_geglu.hub.push import push
    from hf_geglu.hub.saving import save_folder
    from hf_geglu.identifying import Identity, Unknown, identify
    from hf_geglu.inspecting import GateReport, inspect_gates
    from hf_geglu.optimizing import OptimizationReport, optimize
    from hf_geglu.plan import Plan
    from hf_geglu.planning import make_plan
    from hf_geglu.sites import FoundSites, Rejection, Site, find_sites
    from hf_geglu.surgery import forget_original, revert
    from hf_geglu.verify import Report

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "CollapseReport",
    "Comparison",
    "FoundSites",
    "GateReport",
    "HfGegluError",
    "Identity",
    "OptimizationReport",
    "Plan",
    "Rejection",
    "Report",
    "Site",
    "Unknown",
    "Variant",
    "collapse",
    "compare",
    "convert",
    "convert_checkpoint",
    "find_sites",
    "forget_original",
    "from_pretrained",
    "geglu_config",
    "identify",
    "inspect_gates",
    "make_plan",
    "optimize",
    "push",
    "revert",
    "save_folder",
]

_HOMES = {
    "CollapseReport": "collapsing",
    "Comparison": "distance",
    "FoundSites": "sites",
    "GateReport": "inspecting",
    "Identity": "identifying",
    "OptimizationReport": "optimizing",
    "Plan": "plan",
    "Rejection": "sites",
    "Report": "verify",
    "Site": "sites",
    "collapse": "collapsing",
    "Unknown": "identifying",
    "compare": "distance",
    "convert": "converting",
    "convert_checkpoint": "checkpoint",
    "find_sites": "sites",
    "forget_original": "surgery",
    "from_pretrained": "hub.loading",
    "geglu_config": "config",
    "identify": "identifying",
    "inspect_gates": "inspecting",
    "make_plan": "planning",
    "optimize": "optimizing",
    "push": "hub.push",
    "revert": "surgery",
    "save_folder": "hub.saving",
}

# Once these are imported, which loading any model does: by themselves they cost a second.
when_imported("transformers.activations", "hf_geglu.variants:register")
when_imported("transformers.models.auto.configuration_auto", "hf_geglu.auto:register")
neighbours.register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
