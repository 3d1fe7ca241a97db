"""Synthetic inputs for a whole model, from what its config and its signature say.

For verifications where the user hands in none. `values` makes one argument, `candidates` puts several together in the
order in which they are likely to be right; which of them is right, the model itself says.
"""

from hf_geglu.inputs.candidates import candidate_inputs, synthetic_inputs
from hf_geglu.inputs.values import BATCH, TOKENS, Inputs

__all__ = ["BATCH", "TOKENS", "Inputs", "candidate_inputs", "synthetic_inputs"]
