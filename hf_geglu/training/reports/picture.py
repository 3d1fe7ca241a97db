"""Loss curves as a picture: held-out nll over steps, one line a model, with the values to beat as horizontal lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_geglu.errors import DataError, HfGegluError

# Okabe & Ito's palette, which colour-blind readers can tell apart; strongest contrasts first.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_STROKES = ((3.6, 7.5, "o"), (2.4, 5.5, "s"), (1.5, 4.0, "D"))  # width and marker size in points
_INK, _FAINT = "#222222", "#8a8a8a"


def loss_curves(
    path: Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    marks: Mapping[str, float] | None = None,
    title: str = "",
    value: str = "held-out nll, nats per token",
) -> Path:
    """Draw loss curves into a PNG of 1440 x 810 pixels. Each line carries its name and its last value.

    Args:
        path: of the picture; its folder is there already.
        curves: name -> (step, nll in nats per token), in the order of the steps. A single point is drawn as a dot.
        marks: name -> nll in nats per token, drawn as a dashed line: where a model stands that is not trained.
        title: one line above.
        value: what the vertical axis shows.

    Returns:
        `path`.

    Raises:
        DataError: nothing to draw.
        HfGegluError: matplotlib is missing.
    """
    if not curves or not all(curves.values()):
        raise DataError(f"no points to draw in {dict(curves)}; expected at least one (step, nll) in each curve")
    try:
        # Not pyplot: that keeps every figure in a global list and picks a window system.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise HfGegluError("drawing takes matplotlib. Install it: pip install 'hf_geglu[plot]'") from error

    figure = Figure(figsize=(9.6, 5.4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels: list[tuple[float, str, str]] = []
    for index, (name, points) in enumerate(curves.items()):
        steps, values = zip(*points, strict=True)
        colour = _COLOURS[index % len(_COLOURS)]
        # Later curves are thinner, so that one which covers another leaves it visible: that is the hoped-for result.
        width, size, marker = _STROKES[min(index, len(_STROKES) - 1)]
        axes.plot(steps, values, color=colour, linewidth=width, marker=marker, markersize=size, zorder=3 + index)
        labels.append((values[-1], name, colour))
    for name, level in (marks or {}).items():
        axes.axhline(level, color=_FAINT, linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
        labels.append((level, name, _FAINT))

    axes.set_xlabel("step")
    axes.set_ylabel(value)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.margins(x=0.02, y=0.08)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=_INK)
    if title:
        axes.set_title(title, loc="left", color=_INK, fontsize=13, pad=12)
    _write_labels(axes, labels)
    figure.savefig(path)
    return path


def _write_labels(axes: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names and values at the right edge, each at the height of its line, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)  # a line of text, as part of the height of the axes
    ordered = sorted(labels)
    heights = spread([height for height, _, _ in ordered], gap=gap, low=low, high=high)
    for (level, name, colour), height in zip(ordered, heights, strict=True):
        axes.annotate(
            f"{name}  {level:.3f}",
            xy=(1, level),
            xytext=(1.035, height),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=colour if colour != _FAINT else _INK,
            fontsize=10,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.8,
                "shrinkA": 2,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def spread(heights: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Move sorted heights apart until neighbours are `gap` away from each other, within low and high if they fit.

    Pushed up only and pushed down only are both far enough apart, hence so is their mean, which stays in the middle.
    """
    middle = [(up + down) / 2 for up, down in zip(_push_up(heights, gap), _push_down(heights, gap), strict=True)]
    return _push_down(_push_up(middle, gap, floor=low), gap, ceiling=high)


def _push_up(heights: Sequence[float], gap: float, floor: float = -math.inf) -> list[float]:
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, floor))
        floor = placed[-1] + gap
    return placed


def _push_down(heights: Sequence[float], gap: float, ceiling: float = math.inf) -> list[float]:
    return [-height for height in reversed(_push_up([-height for height in reversed(heights)], gap, floor=-ceiling))]
