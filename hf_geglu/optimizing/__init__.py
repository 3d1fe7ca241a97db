"""`hf_geglu.optimize`: the kernels of `hf_geglu.ops` in a live model.

`recognise` proves that a block is what a kernel computes, `installing` puts a `running` recipe into it, and at every
call `plain` says whether the call may be taken from the module.
"""

from __future__ import annotations

from hf_geglu.optimizing.installing import optimize
from hf_geglu.optimizing.report import OptimizationReport, SiteOps

__all__ = ["OptimizationReport", "SiteOps", "optimize"]
