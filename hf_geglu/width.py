"""Width arithmetic: how many neurons a GeGLU block has at the parameters of a dense one."""

from __future__ import annotations

TOLERANCE = 0.02
"""A matched width may miss the exact two thirds by this share for the sake of a round number."""


def matched_width(width: int) -> int:
    """Intermediate size at which a gated block has the parameters of a dense one of `width` neurons.

    Three matrices instead of two: ``3 D F' = 2 D F``, so F' = 2F/3 (Shazeer 2020, arXiv:2002.05202, section 3.1, which
    goes
    from 3072 to 2048). Rounded to a multiple of the largest power of two, up to 64, that stays within 2 %: kernels like
    multiples of 64.
    """
    exact = 2 * width / 3
    for multiple in (64, 32, 16, 8, 4, 2):
        rounded = multiple * max(1, round(exact / multiple))
        if abs(rounded - exact) <= TOLERANCE * exact:
            return rounded
    return max(1, round(exact))
