"""What is read off a training while it runs, whoever's loop it is, by the same four hooks.

A step lasts from the end of one optimizer step to the end of the next: data, forward, backward, update, and whatever
the loop does besides. What comes before the first step and after the last one is nobody's step.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.memory import begin_high_water, status


class Enough(BaseException):
    """Ends a training after its last measured step: no evaluation, nothing is saved."""


class Meter:
    """Installed for good: a process measures one training.

    Attributes:
        losses: of each step, what was handed to backward.
        batches: SHA-256 of what is embedded last in each step, the input_ids, the first 16 digits.
        cpu, wall: seconds of each step from the second one on.
        loaded: bytes of the process once the model was loaded.
        peak: the highest of the process after that, up to the last step.
    """

    def __init__(self, *, steps: int) -> None:
        self.losses: list[float] = []
        self.batches: list[str] = []
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self.loaded = self.peak = 0
        self._steps, self._seen = steps, ""
        self._before: tuple[float, float] | None = None

    def install(self) -> None:
        """Before anything of the training is imported by name."""
        from accelerate import Accelerator
        from torch.optim.optimizer import register_optimizer_step_post_hook
        from transformers import PreTrainedModel

        self._wrap(torch.nn.functional, "embedding", before=self._embeds)
        self._wrap(Accelerator, "backward", before=lambda *args: self.losses.append(float(args[1])))
        load = PreTrainedModel.from_pretrained.__func__

        def loads(cls: Any, *args: Any, **kwargs: Any) -> Any:
            model = load(cls, *args, **kwargs)
            self._has_loaded(model[0] if isinstance(model, tuple) else model)
            return model

        PreTrainedModel.from_pretrained = classmethod(loads)
        register_optimizer_step_post_hook(self._stepped)

    @staticmethod
    def _wrap(owner: Any, name: str, *, before: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before(*args)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def _has_loaded(self, model: nn.Module) -> None:
        if self.loaded:
            raise RuntimeError("a second model was loaded: expected one a process")
        for tensor in model.state_dict().values():
            tensor.sum()  # its file is mapped: what nobody has read yet is not there
        gc.collect()
        begin_high_water()
        self.loaded = status("VmRSS")

    def _embeds(self, ids: Tensor, *_: object) -> None:
        # The last one before the update is that of the step: these models embed nothing but tokens, once a forward.
        if type(ids) is Tensor and ids.device.type == "cpu":
            self._seen = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]

    def _stepped(self, *_: object) -> None:
        now = time.process_time(), time.perf_counter()
        self.batches.append(self._seen)
        self._seen = ""
        if self._before is not None:
            self.cpu.append(now[0] - self._before[0])
            self.wall.append(now[1] - self._before[1])
        if len(self.batches) == self._steps:
            self.peak = status("VmHWM")
            raise Enough
        self._before = time.process_time(), time.perf_counter()

    def result(self) -> dict[str, Any]:
        """What was read, for JSON.

        Raises:
            RuntimeError: the training ended before its last step, or went by a hook.
        """
        steps = len(self.batches)
        if steps != self._steps or len(self.losses) != steps or not self.loaded:
            raise RuntimeError(
                f"{steps} optimizer steps, {len(self.losses)} calls of backward, "
                f"{'a' if self.loaded else 'no'} model loaded: expected {self._steps} of both and one model"
            )
        return {
            "losses": self.losses,
            "batches": self.batches,
            "cpu": self.cpu,
            "wall": self.wall,
            "loaded": self.loaded,
            "peak": self.peak,
        }
