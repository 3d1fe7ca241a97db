"""Fast kernels behind one function each: `glu`, the unit ``activation(gate) * value``; `ffn`, the whole block; and
`linear_cross_entropy`, a head with its loss. Tensors in, tensors out.

`hf_geglu.optimize` installs the first two in a model; nothing here knows of models.
"""

from __future__ import annotations

from hf_geglu.ops.cross_entropy import linear_cross_entropy
from hf_geglu.ops.feed_forward import ffn
from hf_geglu.ops.form import MODES, Form, Mode, Projection, split
from hf_geglu.ops.pointwise import Backend, glu, packed_glu

__all__ = [
    "MODES",
    "Backend",
    "Form",
    "Mode",
    "Projection",
    "ffn",
    "glu",
    "linear_cross_entropy",
    "packed_glu",
    "split",
]
