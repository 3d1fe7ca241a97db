"""How near is a narrow model to its original, in what its users look at?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hf_geglu.distance import cast, compare, outputs_of
from hf_geglu.inputs import Inputs
from hf_geglu.modes import evaluating
from hf_geglu.narrow_record import Fidelity
from hf_geglu.narrowing.objective import embedding

NEIGHBOURS = 10


def fidelity(original: nn.Module, model: nn.Module, batches: Sequence[Inputs]) -> Fidelity:
    """Compare two models on batches that neither was fitted to."""
    if _has_logits(original, batches[0]):
        compared = compare(original, model, batches)
        causal = compared.delta_nll is not None
        return Fidelity(kl=compared.kl, delta_nll=compared.delta_nll if causal else None, samples=compared.tokens)
    one, other = (embeddings(each, batches) for each in (original, model))
    return Fidelity(
        cosine=float((one * other).sum(-1).mean()),
        neighbours=None if len(one) <= NEIGHBOURS else float(neighbour_agreement(one, other).mean()),
        samples=len(one),
    )


def embeddings(model: nn.Module, batches: Sequence[Inputs]) -> torch.Tensor:
    """The unit sentence embeddings (N, D) of all batches, in float32."""
    found = []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            given = cast(batch, model)
            found.append(embedding(outputs_of(model, given), given).float().cpu())
    return torch.cat(found)


def neighbour_agreement(one_ND: torch.Tensor, other_ND: torch.Tensor) -> torch.Tensor:
    """For every sentence, the share of its ten nearest by cosine that both sets of embeddings agree on, (N,)."""
    nearest = [_nearest(each) for each in (one_ND, other_ND)]
    count = nearest[0].shape[1]
    return (nearest[0][:, :, None] == nearest[1][:, None, :]).any(-1).sum(-1) / count


def _nearest(embeddings_ND: torch.Tensor) -> torch.Tensor:
    similar = embeddings_ND @ embeddings_ND.T
    similar.fill_diagonal_(-torch.inf)
    return similar.topk(min(NEIGHBOURS, len(similar) - 1)).indices


def _has_logits(model: nn.Module, batch: Inputs) -> bool:
    with evaluating(model), torch.no_grad():
        return "logits" in outputs_of(model, cast(batch, model))
