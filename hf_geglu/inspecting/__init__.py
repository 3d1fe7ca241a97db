"""What the gates of a model do: read off its weights, and heard on real inputs in bounded memory."""

from hf_geglu.inspecting.gates import inspect_gates
from hf_geglu.inspecting.report import GateReport, Neurons, SiteGates

__all__ = ["GateReport", "Neurons", "SiteGates", "inspect_gates"]
