"""What a run will take: counted against formulas, measured against the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import llama, one_thread, random_blocks  # noqa: F401

pytest.importorskip("accelerate")

from hf_geglu.training import CausalLM, TrainSettings
from hf_geglu.training import forecast as room
from hf_geglu.training.best import BestModel
from hf_geglu.training.forecast import Forecast, forecast
from hf_geglu.training.reports.records import EvalRecord


def settings(**changed: Any) -> TrainSettings:
    how = {
        "max_steps": 40,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "warmup_steps": 10,
        "use_cpu": True,
    }
    return TrainSettings(**{**how, **changed})


def look(tmp_path: Path, model: torch.nn.Module | None = None, **changed: Any) -> Forecast:
    more = {name: changed.pop(name) for name in ("max_memory", "eval_blocks") if name in changed}
    return forecast(
        model or llama(),
        random_blocks(20),
        more.pop("eval_blocks", random_blocks(3)),
        settings(**changed),
        objective=CausalLM(),
        total_steps=40,
        folder=tmp_path / "out",
        keep=2,
        **more,
    )


def test_counts(tmp_path: Path) -> None:
    model = llama()
    found = look(tmp_path, model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert found.parameters == found.trained == parameters
    assert found.tokens_per_step == 4 * 16
    # three products a weight matrix and token (forward, and one for each gradient), two FLOPs a multiplication
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert found.flops_per_step >= 6 * matrices * 64 * 0.99
    assert found.flops_per_step < 6 * matrices * 64 * 1.5  # attention besides
    assert found.disk_bytes == 4 * parameters + 3 * 12 * parameters
    assert found.peak_bytes > 0
    assert found.evaluation_seconds > 0
    assert not (tmp_path / "out").exists()
    assert not found.advice


def test_a_part_is_trained(tmp_path: Path) -> None:
    found = look(tmp_path, trainable="value")
    assert found.trained == 2 * 16 * 32
    assert found.flops_per_step < look(tmp_path).flops_per_step


def test_evaluations_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100))
    monkeypatch.setattr(room.time, "perf_counter", lambda: float(next(times)))
    # three blocks in one second; at step 0, 10, 20, 30 and 40
    assert look(tmp_path, eval_steps=10).evaluation_seconds == pytest.approx(5.0)
    assert look(tmp_path).evaluation_seconds == pytest.approx(2.0)


def test_what_does_not_fit_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a made-up device: 100 bytes and 10 a block of a forward."""
    sizes: list[int] = []  # of the forwards of each training since memory was last watched
    real = room.train

    class Fake:
        def __init__(self, device: torch.device) -> None:
            self.bytes = 0

        def __enter__(self) -> Fake:
            sizes.clear()
            return self

        def __exit__(self, *_: object) -> None:
            self.bytes = 100 + 10 * sizes[0]

    def train(model: Any, blocks: Any, held_out: Any, how: TrainSettings, **more: Any) -> Any:
        sizes.append(how.per_device_train_batch_size)
        return real(model, blocks, held_out, how, **more)

    monkeypatch.setattr(room, "train", train)
    monkeypatch.setattr(room, "peak_memory", Fake)
    monkeypatch.setattr(room, "GIB", 1)
    assert look(tmp_path, max_memory=140).advice == ()
    (advice,) = look(tmp_path, max_memory=125).advice
    assert "--per_device_train_batch_size 2 --gradient_accumulation_steps 2" in advice
    assert "120.00" in advice
    (advice,) = look(tmp_path, max_memory=90).advice
    assert "even single blocks do not" in advice
    (advice,) = look(tmp_path, max_memory=90, per_device_train_batch_size=1).advice
    assert "--gradient_checkpointing" in advice


class Still:
    """A memory that always holds the same."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = 1000

    def __enter__(self) -> Still:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_what_is_kept_beside_the_model_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "peak_memory", Still)
    model = llama()
    trained = sum(parameter.nbytes for parameter in model.parameters())
    plain, kept = look(tmp_path, model), look(tmp_path, model, load_best_model_at_end=True)
    assert (plain.peak_bytes, kept.peak_bytes) == (1000, 1000 + trained)
    assert kept.disk_bytes == plain.disk_bytes + 3 * trained
    assert look(tmp_path, model, ema_decay=0.9).disk_bytes == kept.disk_bytes
    assert look(tmp_path, model, load_best_model_at_end=True, eval_blocks=None).peak_bytes == 1000


def test_the_best_weights_are_written_over(tmp_path: Path) -> None:
    model = llama()
    best = BestModel(model, keep=True, patience=0, threshold=0.0)
    places = []
    for number, nll in enumerate((3.0, 2.0, 5.0)):
        with torch.no_grad():
            next(model.parameters()).fill_(float(number))
        best.see(EvalRecord(step=number, nll=nll, perplexity=1.0, tokens=1))
        places.append({name: tensor.data_ptr() for name, tensor in best._weights.items()})
    assert places[0] == places[1] == places[2]
    best.give()
    assert float(next(model.parameters()).detach().max()) == 1.0


def test_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(tmp_path, eval_blocks=None)
    assert "nothing is held out" in found.advice[0]
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert "lower --save_total_limit" in look(tmp_path).advice[0]


def test_it_reads_well() -> None:
    text = str(
        Forecast(
            total_steps=100,
            tokens_per_step=2048,
            parameters=10**6,
            trained=10**5,
            flops_per_step=10**10,
            seconds_per_step=0.5,
            evaluation_seconds=30,
            peak_bytes=3 * 2**30,
            disk_bytes=2**30,
            advice=("the sky is blue",),
        )
    )
    assert "100 of 2,048 tokens: 204,800 tokens" in text
    assert "0:00:50 of training and 0:00:30 of evaluation" in text
    assert text.endswith("mind        the sky is blue")
