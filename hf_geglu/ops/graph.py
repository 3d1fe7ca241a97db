"""What a backward pass may do with what was saved for it."""

from __future__ import annotations

import torch


def graph_is_kept() -> bool:
    """Whether the backward pass that is running may run again (``retain_graph=True``), so that what was saved must
    stay as it is."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else bool(asked())
