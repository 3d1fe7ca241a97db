"""Conversions: named pure functions on weights. Each says where it is exact and what its bound is where it is not."""

from hf_geglu.conversions.expand import expand
from hf_geglu.conversions.retarget import retarget
from hf_geglu.conversions.scaling import SCALINGS, Scaling, find_scaling

__all__ = ["SCALINGS", "Scaling", "expand", "find_scaling", "retarget"]
