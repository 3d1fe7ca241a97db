"""What passes a site in one forward, handed on as soon as it is complete.

Legend of suffixes: T tokens (all positions of a batch that are not masked), D hidden size, F intermediate size,
B batch, P packed (2F), E experts, K experts a token is routed to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_geglu.errors import SiteError
from hf_geglu.functional import split_packed
from hf_geglu.sites import Site
from hf_geglu.sites.weights import bias_name, is_stack, weight_name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """Activations of one site, detached, in the model's dtype. A batch may bring several (shared or chunked blocks)."""

    site: Site
    x_TD: torch.Tensor
    """What the gate projection reads."""
    z_TF: torch.Tensor
    """What enters the activation."""
    v_TF: torch.Tensor | None
    """The value branch with its offset; None for a dense block."""
    h_TF: torch.Tensor | None
    """What enters the down projection; None for experts."""
    out_TD: torch.Tensor | None
    """What leaves it, before its routing weight; None for experts."""
    grad_TD: torch.Tensor | None
    """Gradient of a sampled log-likelihood (or of a random projection of the outputs) with respect to what leaves it;
    None unless asked for."""
    expert: int | None = None
    weight_T1: torch.Tensor | None = None
    """Routing weight of each token, for experts."""


def stack_of_experts(model: nn.Module, site: Site) -> tuple[nn.Module, str, str] | None:
    """The module of stacked experts, and which arguments of its forward are the choice (T, K) and its weights (T, K).
    None where its forward does not look like transformers' (``hidden_states, top_k_index, top_k_weights``)."""
    owner = model.get_submodule(site.up.rpartition(".")[0])
    names = list(inspect.signature(owner.forward).parameters)
    if len(names) == 3 and names[1] == "top_k_index" and names[2] == "top_k_weights":
        return owner, names[1], names[2]
    return None


def why_unseen(model: nn.Module, site: Site) -> str:
    """Empty where `watching` can see the site's activations, else the reason."""
    if site.limit is not None:
        return "it clamps its branches, so that the numbers of each neuron cannot be folded into the weights"
    if site.groups > 1:
        return "it is a grouped convolution"
    if is_stack(site.projection) and (_flat_stack(model, site) or stack_of_experts(model, site) is None):
        return "its experts are called in a way that does not show which token went where"
    return ""


def _flat_stack(model: nn.Module, site: Site) -> bool:
    """Whether the experts' rows lie one after the other in two dimensions (DBRX)."""
    return model.get_parameter(weight_name(site.up, site.projection)).dim() == 2


@contextmanager
def watching(
    model: nn.Module,
    sites: Sequence[Site],
    on_seen: Callable[[Seen], None],
    *,
    gradients: bool,
) -> Iterator[Callable[[torch.Tensor | None], None]]:
    """Call `on_seen` for every site that a forward inside passes; with `gradients` in its backward.

    Yields:
        A function that is told the mask (B, T) of the coming forward, or None: masked positions are left out.

    Raises:
        SiteError: a site cannot be watched, see `why_unseen`.
    """
    for site in sites:
        reason = why_unseen(model, site)
        if reason:
            raise SiteError(f"{site.up} cannot be calibrated: {reason}; leave it out with `layers=`")
    mask: list[torch.Tensor | None] = [None]
    handles: list[Any] = []
    try:
        for site in sites:
            watch = _Experts if is_stack(site.projection) else _Block
            handles += watch(model, site, on_seen, gradients, mask).attach()
        yield lambda given: mask.__setitem__(0, given)
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class _Block:
    """Watches a block whose projections are modules."""

    model: nn.Module
    site: Site
    on_seen: Callable[[Seen], None]
    gradients: bool
    mask: list[torch.Tensor | None]
    now: dict[str, torch.Tensor] = field(default_factory=dict)

    def attach(self) -> list[Any]:
        gate, up, down = (self.model.get_submodule(path) for path in (self.site.gate, self.site.up, self.site.down))
        handles = [gate.register_forward_hook(self._gate)]
        if self.site.layout == "separate":
            handles.append(up.register_forward_hook(self._up))
        return [*handles, down.register_forward_hook(self._down)]

    def _gate(self, _: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        self.now |= {"x": args[0].detach(), "gate": out.detach()}

    def _up(self, _: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        self.now["up"] = out.detach()

    def _down(self, _: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor | None:
        # detached, all of them: a hook on `out` that holds `out` is a cycle through the graph, which is never freed
        held, self.now = {**self.now, "h": args[0].detach(), "out": out.detach()}, {}
        mask = self.mask[0]
        if not self.gradients:
            self._tell(held, None, mask)
            return None
        if not out.requires_grad:  # the first sites of a model whose weights are frozen
            out = out + torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True)
        out.register_hook(lambda grad: self._tell(held, grad, mask))  # type: ignore[no-untyped-call]
        return out

    def _tell(self, held: Mapping[str, torch.Tensor], grad: torch.Tensor | None, mask: torch.Tensor | None) -> None:
        site = self.site
        flat = {name: _flat(tensor, site.dim, mask) for name, tensor in held.items()}
        gate, value = flat["gate"], flat.get("up")
        if site.layout in ("packed", "interleaved"):
            assert site.gate_half is not None
            gate, value = split_packed(gate, site.layout, site.gate_half)
        if value is not None and site.value_offset:
            value = value + site.value_offset
        self.on_seen(
            Seen(
                site=site,
                x_TD=flat["x"],
                z_TF=gate,
                v_TF=value,
                h_TF=flat["h"],
                out_TD=flat["out"],
                grad_TD=None if grad is None else _flat(grad, site.dim, mask),
            )
        )


@dataclass(slots=True)
class _Experts:
    """Watches stacked experts: each with the tokens that were routed to it."""

    model: nn.Module
    site: Site
    on_seen: Callable[[Seen], None]
    gradients: bool
    mask: list[torch.Tensor | None]

    def attach(self) -> list[Any]:
        found = stack_of_experts(self.model, self.site)
        assert found is not None
        owner, choice, weights = found

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> torch.Tensor | None:
            given = dict(zip(("hidden_states", choice, weights), args, strict=False)) | kwargs
            x_TD, index_TK, weight_TK = (given[name].detach() for name in ("hidden_states", choice, weights))
            keep = _kept(self.mask[0], len(x_TD))
            if not self.gradients:
                self._tell(x_TD, index_TK, weight_TK, None, keep_T=keep)
                return None
            if not out.requires_grad:
                out = out + torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True)
            tell = partial(self._tell, x_TD, index_TK, weight_TK, keep_T=keep)
            out.register_hook(lambda grad: tell(grad.reshape(len(x_TD), -1)))  # type: ignore[no-untyped-call]
            return out

        return [owner.register_forward_hook(hook, with_kwargs=True)]

    def _tell(
        self,
        x_TD: torch.Tensor,
        index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        grad_TD: torch.Tensor | None,
        *,
        keep_T: torch.Tensor | None,
    ) -> None:
        for expert in range(self.model.get_parameter(weight_name(self.site.up, self.site.projection)).shape[0]):
            chosen_TK = index_TK == expert
            if keep_T is not None:
                chosen_TK = chosen_TK & keep_T[:, None]
            tokens = chosen_TK.any(dim=1).nonzero()[:, 0]
            if not len(tokens):
                continue
            x = x_TD[tokens]
            gate, value = self._branches(x, expert)
            self.on_seen(
                Seen(
                    site=self.site,
                    x_TD=x,
                    z_TF=gate,
                    v_TF=value,
                    h_TF=None,
                    out_TD=None,
                    grad_TD=None if grad_TD is None else grad_TD[tokens],
                    expert=expert,
                    weight_T1=(weight_TK * chosen_TK).sum(dim=1, keepdim=True)[tokens],
                )
            )

    def _branches(self, x: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        site = self.site
        gate = self._project(x, site.gate, expert)
        if site.layout == "dense":
            return gate, None
        if site.layout == "separate":
            return gate, self._project(x, site.up, expert) + site.value_offset
        assert site.gate_half is not None
        gate, value = split_packed(gate, site.layout, site.gate_half)
        return gate, value + site.value_offset

    def _project(self, x: torch.Tensor, path: str, expert: int) -> torch.Tensor:
        weight = self.model.get_parameter(weight_name(path, self.site.projection)).detach()[expert]
        weight = weight.T if self.site.projection == "stack_transposed" else weight
        owner, _, name = bias_name(path, self.site.projection).rpartition(".")
        bias = self.model.get_submodule(owner)._parameters.get(name)
        return nn.functional.linear(x, weight, None if bias is None else bias.detach()[expert])


def _flat(tensor: torch.Tensor, dim: int, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """(T, width), masked positions left out."""
    flat = tensor.detach().movedim(dim, -1).flatten(0, -2)
    keep = _kept(mask_BT, len(flat))
    return flat if keep is None else flat[keep]


def _kept(mask_BT: torch.Tensor | None, positions: int) -> torch.Tensor | None:
    """Which positions are tokens, None for all; a mask of another size says nothing of them."""
    if mask_BT is None or mask_BT.numel() != positions:
        return None
    return mask_BT.flatten().bool()
