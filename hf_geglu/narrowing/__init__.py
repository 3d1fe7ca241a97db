"""Conversions to fewer neurons: which stay, what the others leave behind, and what training on the original's own
outputs repairs. Never exact."""

from hf_geglu.narrowing.carry_out import carry_out
from hf_geglu.narrowing.settings import STAGES, NarrowSettings, Stage

__all__ = ["STAGES", "NarrowSettings", "Stage", "carry_out"]
