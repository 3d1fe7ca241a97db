"""The way back: a converted block whose value branch has learned nothing becomes the dense block that it was."""

from hf_geglu.collapsing.model import collapse
from hf_geglu.collapsing.plan import CollapsePlan, Kept, SiteCollapse
from hf_geglu.collapsing.report import CollapseReport

__all__ = ["CollapsePlan", "CollapseReport", "Kept", "SiteCollapse", "collapse"]
