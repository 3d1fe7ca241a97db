"""The GLU family as a frozen table, and its registration in transformers' ACT2FN.

    FFN_variant(x) = ( f(x Wg + bg) * (x Wv + bv) ) Wd + bd

A variant is what `f` is. Packed units are registered under the variant's name: ``ACT2FN["geglu"]`` maps (..., 2F) to
(..., F), gate half first (see `hf_geglu.modeling_geglu.PackedGLU`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hf_geglu.errors import VariantError
from hf_geglu.modeling_geglu import PackedGLU

SHAZEER = "Shazeer 2020, arXiv:2002.05202"
DAUPHIN = "Dauphin et al. 2017, arXiv:1612.08083"


@dataclass(frozen=True, slots=True)
class Variant:
    """One member of the family."""

    name: str
    gate: str
    """Name in ACT2FN of the activation `f` of the gate."""
    formula: str
    source: str
    """The paper that defines it."""


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            Variant("geglu", "gelu", "z Phi(z) * v, Phi by erf", f"{SHAZEER}, eq. 6; GELU: arXiv:1606.08415"),
            Variant(
                "geglu_tanh",
                "gelu_pytorch_tanh",
                "z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) * v",
                f"{SHAZEER}, eq. 6; tanh form: arXiv:1606.08415, section 2",
            ),
            Variant("swiglu", "silu", "z sigmoid(z) * v", f"{SHAZEER}, eq. 6"),
            Variant("reglu", "relu", "max(0, z) * v", f"{SHAZEER}, eq. 6"),
            Variant("bilinear", "linear", "z * v", f"{SHAZEER}, eq. 5; after arXiv:1612.08083"),
            Variant("glu", "sigmoid", "sigmoid(z) * v", f"{DAUPHIN}, eq. 1"),
        )
    }
)

_LOCK = threading.Lock()


def get_variant(name: str) -> Variant:
    """The variant of that name. Raises VariantError with the list of names."""
    try:
        return VARIANTS[name]
    except (KeyError, TypeError):
        raise VariantError(f"unknown GLU variant {name!r}; expected one of: {', '.join(VARIANTS)}") from None


def register(activations: Any = None) -> None:
    """Put every variant into ``ACT2FN``. Idempotent and thread-safe.

    Args:
        activations: transformers' module of that name, where its import is what asks for this.

    Raises:
        VariantError: a different object already has one of the names. Nothing is registered then.
    """
    from transformers.activations import ACT2FN

    entries = {variant.name: (PackedGLU, {"activation": variant.gate}) for variant in VARIANTS.values()}
    with _LOCK:
        for name, entry in entries.items():
            # ACT2FN[name] would build a module; the stored entry is what counts
            present = dict.get(ACT2FN, name)
            if present is not None and present != entry:
                raise VariantError(
                    f"transformers' ACT2FN already has {name!r}: {present!r}; hf_geglu would have to replace it and "
                    "does "
                    "not. Import hf_geglu before the code that registers it, or register that one under another name"
                )
        for name, entry in entries.items():
            ACT2FN[name] = entry
