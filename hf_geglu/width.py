"""Width arithmetic: how many neurons a GeGLU block has at the parameters of a dense one."""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

from hf_geglu.errors import PlanError

Width = Literal["same", "matched"] | int | float
"""An intermediate size as a user says it: "same", "matched" (the parameters of a dense block), a share of the neurons
below 1, or their number."""

TOLERANCE = 0.02
"""A matched width may miss the exact two thirds by this share for the sake of a round number."""


def matched_width(width: int) -> int:
    """Intermediate size at which a gated block has the parameters of a dense one of `width` neurons.

    Three matrices instead of two: ``3 D F' = 2 D F``, so F' = 2F/3 (Shazeer 2020, arXiv:2002.05202, section 3.1, which
    goes from 3072 to 2048). Rounded to a multiple of the largest power of two, up to 64, that stays within 2 %: kernels
    like multiples of 64.
    """
    return _round(2 * width / 3)


def narrow_width(width: Width, old: int, *, gated: bool) -> int:
    """How many neurons of `old` a block keeps.

    Args:
        width: what was asked for. "matched" keeps the parameters: two thirds of a dense block, all of a gated one. A
            share is rounded like that; a number is taken as it is.
        old: neurons now.
        gated: whether the block is gated already.

    Raises:
        PlanError: more neurons than there are, none, or another word.
    """
    if width == "same" or (width == "matched" and gated):
        return old
    if width == "matched":
        return matched_width(old)
    if isinstance(width, float) and 0.0 < width <= 1.0:
        return old if width == 1.0 else min(old, _round(width * old))
    if isinstance(width, int) and not isinstance(width, bool) and 1 <= width <= old:
        return width
    raise PlanError(
        f"width={width!r} for a block of {old} neurons; expected 'same', 'matched', a share between 0 and 1 such as "
        f"0.75, or a number from 1 to {old}"
    )


def parse_width(text: str) -> Width:
    """A width as it is typed: "same", "matched", "0.75", "1024".

    Raises:
        PlanError: anything else.
    """
    if text in ("same", "matched"):
        return "same" if text == "same" else "matched"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise PlanError(f"width {text!r}; expected same, matched, a share such as 0.75, or a number of neurons")


def _round(exact: float) -> int:
    for multiple in (64, 32, 16, 8, 4, 2):
        rounded = multiple * max(1, round(exact / multiple))
        if abs(rounded - exact) <= TOLERANCE * exact:
            return rounded
    return max(1, round(exact))
