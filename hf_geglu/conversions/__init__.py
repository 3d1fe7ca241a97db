"""Conversions: named pure functions on weights. Each says where it is exact and what its bound is where it is not."""

from hf_geglu.conversions.coefficients import Coefficients
from hf_geglu.conversions.collapse import at_start, collapse, packed_halves, scale_neurons
from hf_geglu.conversions.expand import expand
from hf_geglu.conversions.replacement import NewWeights
from hf_geglu.conversions.retarget import retarget, retarget_packed
from hf_geglu.conversions.rewrite import Line, Rewrite, branch_outputs, rewrites, scale_at_run_time, value_offset
from hf_geglu.conversions.scaling import SCALINGS, Scaling, find_scaling

__all__ = [
    "SCALINGS",
    "Coefficients",
    "Line",
    "NewWeights",
    "Rewrite",
    "Scaling",
    "at_start",
    "branch_outputs",
    "collapse",
    "expand",
    "find_scaling",
    "packed_halves",
    "retarget",
    "retarget_packed",
    "rewrites",
    "scale_at_run_time",
    "scale_neurons",
    "value_offset",
]
