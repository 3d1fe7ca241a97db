"""What a unit turned out to be: an `Identity`, or an `Unknown` with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

from hf_geglu.sites.site import GateHalf
from hf_geglu.variants import VARIANTS

Family = Literal["glu", "bilinear", "reglu", "geglu", "swiglu", "tanh gate", "gated", "dense", "other"]
"""The members of Shazeer 2020, arXiv:2002.05202, eq. 5 and 6; "tanh gate" and "gated" (any other activation) are of the
same form without a name of their own; "dense" has no gate; "other" is understood, and none of these."""

Gelu = Literal["erf", "tanh", "quick"]
Limits = tuple[float | None, float | None]

UNLIMITED: Limits = (None, None)

_FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "sigmoid": "glu",
        "linear": "bilinear",
        "relu": "reglu",
        "gelu": "geglu",
        "gelu_pytorch_tanh": "geglu",
        "silu": "swiglu",
        # z sigmoid(1.702 z) is Swish with beta 1.702 exactly, and GELU only to 0.02
        "quick_gelu": "swiglu",
        "tanh": "tanh gate",
    }
)
_GELUS: Mapping[str, Gelu] = MappingProxyType({"gelu": "erf", "gelu_pytorch_tanh": "tanh", "quick_gelu": "quick"})
_BY_GATE = MappingProxyType({variant.gate: name for name, variant in VARIANTS.items()})


def family_of(activation: str) -> Family:
    """The family of a unit whose gate goes through that activation."""
    return _FAMILIES.get(activation, "gated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a unit computes, and how far that is from what was observed.

    A gated unit is ``factor * act(scale * gate) * (value + value_offset)``, a dense one ``factor * act(scale * z)``.
    """

    family: Family
    formula: str
    """In words of mathematics, with everything that the fields below say."""
    activation: str | None = None
    """Name in ACT2FN; a name of torch's where that has none; None where no single function describes the unit."""
    scale: float = 1.0
    """What the gate is multiplied by inside the activation: 1.702 in ``z sigmoid(1.702 z)``."""
    factor: float = 1.0
    shift: float = 0.0
    """Added to the gate inside the activation, after the scale."""
    gate: str | None = None
    """Path of the projection that goes through the activation, or the argument of a function."""
    value: str | None = None
    down: str | None = None
    """Path of the projection that reads the unit; None where the unit has none."""
    layout: str | None = None
    """dense, separate, packed, interleaved, or in words how else gate and value are paired."""
    gate_half: GateHalf | None = None
    value_offset: float = 0.0
    gate_limits: Limits = UNLIMITED
    """Bounds that the gate is clamped to before the activation."""
    value_limits: Limits = UNLIMITED
    gate_bias: bool | None = None
    """Whether the gate projection has a bias; None where there is no projection to be seen."""
    value_bias: bool | None = None
    down_bias: bool | None = None
    difference: str | None = None
    """Of "other": what keeps the unit from being one of the family."""
    notes: tuple[str, ...] = ()
    path: str = ""
    """Where in the module that was asked about; "" for itself."""
    class_name: str = ""
    error: float | None = None
    """Largest |formula - observed| / (1 + |observed|) in float64; where a unit computes in a lower precision, the mean
    of |formula - observed| / (|observed| + 1e-3) with both in that precision. None where
    there is no formula."""
    runner_up: str | None = None
    """The next best hypothesis."""
    runner_up_error: float | None = None
    """Its error, on the same values."""

    @property
    def gated(self) -> bool:
        """Whether the unit is a member of the GLU family."""
        return self.family not in ("dense", "other")

    @property
    def gelu(self) -> Gelu | None:
        """Which form of GELU; "quick" is ``z sigmoid(1.702 z)``."""
        return _GELUS.get(self.activation or "")

    @property
    def variant(self) -> str | None:
        """Name in `hf_geglu.VARIANTS` where the unit is exactly that one: no scale, no clamp, no offset."""
        plain = (self.scale, self.factor, self.shift, self.value_offset) == (1.0, 1.0, 0.0, 0.0)
        limited = self.gate_limits != UNLIMITED or self.value_limits != UNLIMITED
        return _BY_GATE.get(self.activation or "") if self.gated and plain and not limited else None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"known": True, "variant": self.variant, "gelu": self.gelu, **told}

    def __str__(self) -> str:
        name = {"tanh gate": "tanh gate", "gated": f"gated {self.activation}", "dense": f"dense {self.activation}"}
        title = name.get(self.family, self.family) + (f" ({self.gelu})" if self.gelu and self.gated else "")
        said = [f"{title}: {self.formula}"]
        if self.difference:
            said.append(self.difference)
        if self.layout and self.layout != "dense":
            said.append(f"{self.layout}, gate {self.gate_half}" if self.gate_half else self.layout)
        said += self.notes
        rival = f"; next {self.runner_up} {self.runner_up_error:.1e}" if self.runner_up_error is not None else ""
        measured = f" [error {self.error:.1e}{rival}]" if self.error is not None else ""
        return "; ".join(said) + measured


@dataclass(frozen=True, slots=True)
class Unknown:
    """No answer, and why there is none."""

    reason: str
    path: str = ""
    class_name: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"known": False, "reason": self.reason, "path": self.path, "class_name": self.class_name}

    def __str__(self) -> str:
        return f"unknown: {self.reason}"
