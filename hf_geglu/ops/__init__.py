"""Fast kernels, one function each, equal to the formulas of `hf_geglu.functional` and of torch."""

from hf_geglu.ops.cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
