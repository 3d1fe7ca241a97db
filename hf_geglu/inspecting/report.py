"""What was found about the gates of a model. Frozen.

Legend of suffixes: F neurons, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Neurons:
    """One number a neuron, (F,) float32 each. None where it does not apply, or was not measured."""

    gate_norm: torch.Tensor
    """Euclidean norm of its row of Wg."""
    value_norm: torch.Tensor | None = None
    """The same of Wv."""
    learned: torch.Tensor | None = None
    """How far its row of Wv is from where the conversion put it, over `gate_norm`."""
    constant: torch.Tensor | None = None
    """``bv / start - 1``: how far its constant is from the conversion's."""
    down_norm: torch.Tensor
    """Euclidean norm of its column of Wd."""
    twin: torch.Tensor
    """Largest |cos| of its row of Wg with another neuron's."""
    mean: torch.Tensor | None = None
    """Of its gate's input z over the tokens."""
    std: torch.Tensor | None = None
    low: torch.Tensor | None = None
    """5 % of its inputs are below, to the width of a bin (`sketch.BINS`)."""
    median: torch.Tensor | None = None
    high: torch.Tensor | None = None
    """95 % are below."""
    closed: torch.Tensor | None = None
    """Share of tokens at which its gate was closed."""
    value_mean: torch.Tensor | None = None
    value_std: torch.Tensor | None = None
    contribution: torch.Tensor | None = None
    """Its share of the layer's ``sum_n var(h_n) |Wd_n|^2``, h what it gives to the down projection."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteGates:
    """One FFN block."""

    path: str
    """Of its up projection."""
    layer: int | None
    kind: str
    layout: str
    activation: str
    """What the gate goes through."""
    width: int
    unit: float
    """What counts as 1 in z: 128 where a conversion sharpened ReLU so, else 1."""
    value_over_gate: float | None = None
    """``|Wv| / |Wg|``, Frobenius norms; None for a dense block."""
    learned: float | None = None
    """``|Wv - start| / |Wg|``: 0 where nothing was learned. None where the start is not known (gated from birth)."""
    constant: float | None = None
    """Root mean square of ``bv / start - 1``."""
    moved_gate: float | None = None
    """``|Wg - before| / |before|``, where a model from before was given and has the block."""
    moved_value: float | None = None
    """The same of Wv; infinite where it was zero before and is not now."""
    tokens: int = 0
    """That went through this block (experts see those routed to them)."""
    experts: tuple[int, ...] | None = None
    """Tokens that each expert of a stack was given."""
    closed: float | None = None
    """Share of closed gates over neurons and tokens."""
    dead: int | None = None
    """Neurons whose gate was closed at every token (that was routed to their expert, if any was)."""
    empty: int = 0
    """Neurons that cannot reach the output, whatever the input: a zero column of Wd."""
    duplicates: int | None = None
    """Neurons whose output correlates by at least 0.95 in size with that of another one."""
    pairs: tuple[tuple[int, int, float], ...] = ()
    """The closest of them: two neurons and their correlation."""
    value_share: float | None = None
    """Variance of what the block's output loses when every value is replaced by its mean, over the variance of the
    output. More than 1 where what is lost and what stays cancel each other."""
    gate_share: float | None = None
    """The same for the gates."""
    histogram: torch.Tensor | None = None
    """(B,) shares of the gates' inputs, over all neurons; the bins of `sketch.edges`."""
    reasons: tuple[str, ...] = ()
    """Why something was not measured."""
    neurons: Neurons | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateReport:
    """All FFN blocks of a model."""

    model_class: str
    name: str
    tokens: int
    """That were run; 0 for weights alone."""
    sites: tuple[SiteGates, ...]
    before: GateReport | None = None
    """Of the model from before, on the same tokens."""
    note: str = ""

    def to_dict(self, *, neurons: bool = False) -> dict[str, Any]:
        """As plain JSON types; with `neurons` also the numbers of each neuron, to six digits."""
        return {
            "model_class": self.model_class,
            "name": self.name,
            "tokens": self.tokens,
            "note": self.note,
            "sites": [_site(site, neurons) for site in self.sites],
            "before": None if self.before is None else self.before.to_dict(neurons=neurons),
        }

    def __str__(self) -> str:
        from rich.console import Console

        from hf_geglu.inspecting.table import tables

        console = Console(width=150, no_color=True, highlight=False)
        with console.capture() as capture:
            for part in tables(self):
                console.print(part)
        return capture.get().rstrip()


def _site(site: SiteGates, neurons: bool) -> dict[str, Any]:
    data = {field.name: getattr(site, field.name) for field in fields(site) if field.name != "neurons"}
    for name, value in data.items():
        if isinstance(value, torch.Tensor):
            data[name] = _numbers(value)
        elif isinstance(value, float) and value == float("inf"):
            data[name] = "inf"
    if neurons and site.neurons is not None:
        held = {field.name: getattr(site.neurons, field.name) for field in fields(site.neurons)}
        data["neurons"] = {name: None if value is None else _numbers(value) for name, value in held.items()}
    return data


def _numbers(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
