"""The report as a picture: six panels, the model from before in grey where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_geglu.errors import DataError, HfGegluError
from hf_geglu.inspecting.measure import CLOSED
from hf_geglu.inspecting.report import GateReport, SiteGates
from hf_geglu.inspecting.sketch import edges

# Okabe & Ito's palette, which colour-blind readers can tell apart
_NOW, _BEFORE, _SECOND = "#0072B2", "#8a8a8a", "#D55E00"
_INK, _FAINT = "#222222", "#e6e6e6"
_SHOWN = (-6.0, 6.0)
"""Inputs of gates that the first panel shows, in units of z."""


def draw(report: GateReport, stem: Path, *, title: str = "") -> tuple[Path, Path]:
    """Draw a report into STEM.png (2100 x 1200 pixels) and STEM.svg.

    Args:
        report: of a model that was run on text.
        stem: path without an ending; its folder is there already.
        title: one line above.

    Returns:
        The two files.

    Raises:
        DataError: a report of weights alone.
        HfGegluError: matplotlib is missing.
    """
    sites = [site for site in report.sites if site.histogram is not None]
    if not sites:
        raise DataError(
            "nothing to plot: no block was run on text, so there is no distribution of gates; inspect it with batches"
        )
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HfGegluError("drawing takes matplotlib. Install it: pip install 'hf_geglu[plot]'") from error
    figure = Figure(figsize=(14, 8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3).flatten()
    before = None if report.before is None else list(report.before.sites)
    _inputs(figure, panels[0], sites)
    _closed(panels[1], report.sites, before)
    _learned(panels[2], report.sites, before)
    _shares(panels[3], report.sites, before)
    _idle(panels[4], report.sites, before)
    _concentration(panels[5], report.sites, before)
    for panel in panels:
        panel.tick_params(colors=_INK, labelsize=9)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=_INK)
    png, svg = stem.with_suffix(".png"), stem.with_suffix(".svg")
    figure.savefig(png, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": "hf_geglu", "svg.fonttype": "none"}):
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def _inputs(figure: Any, panel: Any, sites: Sequence[SiteGates]) -> None:
    """What goes into the gates: a density a layer, as colours."""
    borders = edges()
    width_B = borders.diff()
    rows = torch.stack([site.histogram.double() / width_B for site in sites])  # type: ignore[union-attr]
    shown = panel.pcolormesh(
        borders.tolist(), torch.arange(len(sites) + 1).sub(0.5).tolist(), rows.tolist(), cmap="Blues", rasterized=True
    )
    panel.set_xlim(*_SHOWN)
    panel.axvline(0.0, color=_INK, linewidth=0.8, linestyle=(0, (4, 4)))
    figure.colorbar(shown, ax=panel, label="density", pad=0.01)
    _label(
        panel, "what goes into the gates, now", "z" if all(site.unit == 1 for site in sites) else "z / scale", "block"
    )
    panel.set_yticks(*_ticks(len(sites)))


def _closed(panel: Any, sites: Sequence[SiteGates], before: Sequence[SiteGates] | None) -> None:
    """Share of closed gates: mean of a layer, and where the middle half of its neurons is."""
    for group, colour, name in _groups(sites, before):
        at = [i for i, site in enumerate(group) if site.closed is not None]
        panel.plot(at, [group[i].closed for i in at], color=colour, marker="o", markersize=4, label=name)
        bands = [_quartiles(group[i]) for i in at]
        if all(bands):
            panel.fill_between(at, [b[0] for b in bands if b], [b[1] for b in bands if b], color=colour, alpha=0.15)
    panel.set_ylim(bottom=0)
    _label(panel, f"closed gates (|f(z)| < 1/{round(1 / CLOSED)}; band: middle half)", "block", "share of tokens")
    _legend(panel, before)


def _quartiles(site: SiteGates) -> tuple[float, float] | None:
    if site.neurons is None or site.neurons.closed is None:
        return None
    low, high = site.neurons.closed.double().quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    return low, high


def _learned(panel: Any, sites: Sequence[SiteGates], before: Sequence[SiteGates] | None) -> None:
    """How far the value branch left its start; of a model that was gated from birth, how large it is."""
    known = any(site.learned is not None for site in sites)
    field = "learned" if known else "value_over_gate"
    for group, colour, name in _groups(sites, before):
        at = [i for i, site in enumerate(group) if getattr(site, field) is not None]
        panel.plot(at, [getattr(group[i], field) for i in at], color=colour, marker="o", markersize=4, label=name)
    if not any(site.value_over_gate is not None for site in sites):
        panel.text(0.5, 0.5, "dense: no value branch", ha="center", va="center", transform=panel.transAxes)
    panel.set_ylim(bottom=0)
    title = "how far the value branch left its start" if known else "size of the value branch"
    _label(panel, title, "block", "|Wv - start| / |Wg|" if known else "|Wv| / |Wg|")
    _legend(panel, before)


def _shares(panel: Any, sites: Sequence[SiteGates], before: Sequence[SiteGates] | None) -> None:
    """What a constant value, or a constant gate, would cost."""
    for group, colour, name in _groups(sites, before):
        for field, style, what in (("value_share", "-", "value"), ("gate_share", ":", "gate")):
            at = [i for i, site in enumerate(group) if getattr(site, field) is not None]
            label = f"constant {what}" + (f", {name}" if before else "")
            values = [getattr(group[i], field) for i in at]
            panel.plot(at, values, color=colour, linestyle=style, marker="o", markersize=4, label=label)
    if not any(site.value_share is not None for site in sites):
        panel.text(0.5, 0.5, "dense: no value branch", ha="center", va="center", transform=panel.transAxes)
    panel.set_yscale("symlog", linthresh=1e-3)  # a gate is worth all of it, a young value branch a hundredth
    panel.set_ylim(bottom=0)
    _label(panel, "what a constant branch would cost", "block", "share of the output's variance")
    panel.legend(frameon=False, fontsize=8)


def _idle(panel: Any, sites: Sequence[SiteGates], before: Sequence[SiteGates] | None) -> None:
    """Dead and duplicate neurons, in percent of the layer."""
    groups = _groups(sites, before)
    width = 0.8 / (2 * len(groups))
    for number, (group, colour, name) in enumerate(groups):
        for kind, (field, hatch) in enumerate((("dead", ""), ("duplicates", "///"))):
            at = [i for i, site in enumerate(group) if getattr(site, field) is not None]
            where = [i - 0.4 + width * (2 * number + kind + 0.5) for i in at]
            label = field + (f", {name}" if before else "")
            heights = [100 * getattr(group[i], field) / group[i].width for i in at]
            bars = {"hatch": hatch, "edgecolor": colour, "facecolor": "white" if hatch else colour, "linewidth": 0.6}
            panel.bar(where, heights, width, label=label, **bars)
    _label(panel, "neurons that do nothing of their own", "block", "% of the block")
    panel.legend(frameon=False, fontsize=8)


def _concentration(panel: Any, sites: Sequence[SiteGates], before: Sequence[SiteGates] | None) -> None:
    """How many neurons carry how much of what the blocks give out."""
    for group, colour, name in _groups(sites, before):
        curves = [
            site.neurons.contribution.double().sort(descending=True).values.cumsum(0)
            for site in group
            if site.neurons is not None and site.neurons.contribution is not None
        ]
        for number, curve in enumerate(curves):
            share = (torch.arange(len(curve)) + 1) / len(curve)
            step = max(1, len(curve) // 200)
            label = name if number == 0 else None
            panel.plot(100 * share[::step], 100 * curve[::step], color=colour, linewidth=0.9, alpha=0.6, label=label)
    panel.plot([0, 100], [0, 100], color=_FAINT, linewidth=1.0, zorder=0)
    panel.set_xlim(0, 100)
    panel.set_ylim(0, 100)
    _label(panel, "how few neurons carry the output (a line a block)", "% of neurons", "% of sum var(h) |Wd|^2")
    _legend(panel, before)


def _groups(
    sites: Sequence[SiteGates], before: Sequence[SiteGates] | None
) -> list[tuple[Sequence[SiteGates], str, str]]:
    now = (sites, _NOW, "now")
    return [now] if before is None else [(before, _BEFORE, "before"), now]


def _label(panel: Any, title: str, x: str, y: str) -> None:
    panel.set_title(title, loc="left", fontsize=10.5, color=_INK)
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.grid(axis="y", color=_FAINT, linewidth=0.8)
    panel.set_axisbelow(True)
    if x == "block":
        from matplotlib.ticker import MaxNLocator

        panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(panel: Any, before: Sequence[SiteGates] | None) -> None:
    if before is not None:
        panel.legend(frameon=False, fontsize=8)


def _ticks(count: int) -> tuple[list[int], list[str]]:
    step = max(1, count // 8)
    at = list(range(0, count, step))
    return at, [str(each) for each in at]
