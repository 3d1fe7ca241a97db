"""Fast kernels behind one function each: `glu`, the unit ``activation(gate) * value``; `ffn`, the whole block;
`linear_cross_entropy`, a head with its loss; `rms_norm` and `causal_attention`. Tensors in, tensors out.

`hf_geglu.optimize` installs them in a model, the training loop the loss; nothing here knows of models.
"""

from __future__ import annotations

from hf_geglu.ops.attention import causal_attention
from hf_geglu.ops.cross_entropy import linear_cross_entropy
from hf_geglu.ops.feed_forward import ffn
from hf_geglu.ops.form import MODES, Form, Mode, Projection, split
from hf_geglu.ops.norm import rms_norm
from hf_geglu.ops.pointwise import Backend, glu, packed_glu

__all__ = [
    "MODES",
    "Backend",
    "Form",
    "Mode",
    "Projection",
    "causal_attention",
    "ffn",
    "glu",
    "linear_cross_entropy",
    "packed_glu",
    "rms_norm",
    "split",
]
