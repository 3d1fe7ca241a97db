"""Which activation can be written with which gate: ``act(z) = f(a z) (alpha z + beta)``, and how well.

Folded into the weights, the same line serves every conversion. A dense block (value branch still free) takes the whole
of it; a gated block, whose value branch is occupied, takes the rows with alpha = 0.

Where the numbers come from:

* 1.702 minimises ``max |Phi(x) - sigmoid(k x)|``, the distance of the logistic from the normal distribution function
  (0.0095). It is the constant of arXiv:1606.08415, section 2: ``gelu(u) ~ u sigmoid(1.702 u)``. With u = z/1.702
  follows
  ``silu(z) ~ 1.702 gelu(z/1.702)``.
* 128 is the sharpness for the kinked activations: ``gelu(k z)/k -> relu(z)`` as k grows, with the error
  ``max |relu(z) - gelu(k z)/k| = max |u Phi(-u)| / k = 0.16997/k``. A power of two costs no rounding in any binary
  format; 128 puts the error (relative RMS 1.5e-4) under the rounding of bfloat16 (2e-3) while ``128 z`` stays inside
  float16 for ``|z| < 511``.
* `max_error` is the supremum over all z, `rms_error` the root mean square of the error relative to that of the
  activation for z ~ N(0, 1). Both are recomputed by the tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_geglu.errors import ConversionError

LOGISTIC = 1.702
SHARPNESS = 128.0


@dataclass(frozen=True, slots=True)
class Scaling:
    """``source(z) = gate(a z) (alpha z + beta)``, up to `max_error`."""

    source: str
    gate: str
    a: float = 1.0
    alpha: float = 0.0
    beta: float = 1.0
    max_error: float = 0.0
    rms_error: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the two sides are the same function (the difference is rounding)."""
        return self.max_error == 0.0

    @property
    def fits_gated(self) -> bool:
        """Whether it leaves the value branch's direction alone, as a block that is already gated needs."""
        return self.alpha == 0.0


_GELUS = ("gelu", "gelu_pytorch_tanh")


def _scalings() -> Iterable[Scaling]:
    for name in ("gelu", "gelu_pytorch_tanh", "silu", "relu", "sigmoid", "linear"):
        yield Scaling(name, name)
    c, k = LOGISTIC, SHARPNESS
    yield Scaling("gelu", "gelu_pytorch_tanh", max_error=4.74e-4, rms_error=1.98e-4)
    yield Scaling("gelu_pytorch_tanh", "gelu", max_error=4.74e-4, rms_error=1.98e-4)
    for gelu, silu_error, quick_error, relu_error, relu2_error in (
        ("gelu", (3.47e-2, 1.14e-2), (2.04e-2, 1.07e-2), (1.329e-3, 1.54e-4), (1.013e-5, 7.03e-7)),
        ("gelu_pytorch_tanh", (3.52e-2, 1.15e-2), (2.07e-2, 1.07e-2), (1.329e-3, 1.54e-4), (1.014e-5, 7.03e-7)),
    ):
        yield Scaling("silu", gelu, 1 / c, 0.0, c, *silu_error)
        yield Scaling("quick_gelu", gelu, 1.0, 0.0, 1.0, *quick_error)
        yield Scaling("relu", gelu, k, 0.0, 1 / k, *relu_error)
        # relu(z)^2 = z relu(z): the value branch is the gate's own input
        yield Scaling("relu2", gelu, k, 1 / k, 0.0, *relu2_error)
        yield Scaling(gelu, "silu", c, 0.0, 1 / c, *quick_error)
        # z sigmoid(1.702 z): a GLU whose value branch is the gate's own input
        yield Scaling(gelu, "sigmoid", c, 1.0, 0.0, *quick_error)
    yield Scaling("quick_gelu", "silu", c, 0.0, 1 / c)
    yield Scaling("relu", "silu", k, 0.0, 1 / k, 2.18e-3, 3.48e-4)
    yield Scaling("relu2", "silu", k, 1 / k, 0.0, 2.95e-5, 3.06e-6)
    yield Scaling("relu2", "relu", 1.0, 1.0, 0.0)
    yield Scaling("silu", "sigmoid", 1.0, 1.0, 0.0)
    yield Scaling("quick_gelu", "sigmoid", c, 1.0, 0.0)
    yield Scaling("relu", "sigmoid", k, 1.0, 0.0, 2.18e-3, 3.48e-4)


SCALINGS = {(scaling.source, scaling.gate): scaling for scaling in _scalings()}


def find_scaling(source: str, gate: str, *, gated: bool) -> Scaling:
    """The row that leads from the activation `source` to the gate activation `gate`.

    Args:
        source: what the block computes now, by its name in ACT2FN.
        gate: the activation of the wanted variant.
        gated: the block already has a value branch, so the row must have alpha = 0.

    Raises:
        ConversionError: there is none; names the gates that the source does lead to.
    """
    scaling = SCALINGS.get((source, gate))
    if scaling is None or (gated and not scaling.fits_gated):
        reachable = sorted({s.gate for s in SCALINGS.values() if s.source == source and (s.fits_gated or not gated)})
        ways = (
            f"it leads to the gates: {', '.join(reachable)}"
            if reachable
            else "no gate of the GLU family is close to it"
        )
        kind = "a gated block" if gated else "a dense block"
        raise ConversionError(
            f"{kind} with the activation {source!r} cannot be written with the gate {gate!r} without losing the "
            f"pretrained function; {ways}. Choose a variant with such a gate, or leave the layer out with `layers=`"
        )
    return scaling
