"""Packages that some model types need, and what is done so that they can be imported.

They lie in a folder beside the environment (`make coverage` fills it from constraints-zoo.txt), not in it: with
torchvision in sight, transformers imports it everywhere, and here only half of it works. PyPI has no torchvision that
matches a CPU build of torch: its compiled operators (nms and the like) cannot be loaded, and importing it stops where
it describes them. So their signatures are declared, without any implementation: torchvision can then be imported, its
layers and transforms work, and calling one of those operators raises NotImplementedError. No model of the zoo does.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[2] / ".zoo-extras"

_SIGNATURES = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[torch.library.Library] = []


def use_extras() -> bool:
    """Make the extra packages importable, where they are installed. Call it before transformers is imported.

    Returns:
        Whether they are there.
    """
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for signature in _SIGNATURES:
            library.define(signature)
        _kept.append(library)
        import torchvision  # noqa: F401
    return True
