"""Averages, best models and distillation: parts of the loop, by themselves."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from tiny_training import gpt2, llama, one_thread, random_blocks  # noqa: F401
from torch import nn
from torch.nn import functional

from hf_geglu.errors import ConfigurationError, TrainingError
from hf_geglu.training.best import BestModel
from hf_geglu.training.distillation import Distillation
from hf_geglu.training.objectives.objective import CausalLM
from hf_geglu.training.processes.accelerator import make_accelerator
from hf_geglu.training.reports.records import EvalRecord
from hf_geglu.training.settings.run import TrainSettings
from hf_geglu.training.updates.averaging import WeightAverage
from hf_geglu.training.updates.clipping import clip_gradients


def moved(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_the_average_follows_its_formula() -> None:
    model = llama()
    average = WeightAverage(model, 0.5)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for step in range(1, 8):
        moved(model, step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    with average.in_place():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(parameter, own[name]) for name, parameter in model.named_parameters())
    other = WeightAverage(llama(), 0.5)
    other.load(average.tensors())
    assert all(torch.equal(value, average.tensors()[name]) for name, value in other.tensors().items())
    with pytest.raises(TrainingError, match="other parameters"):
        WeightAverage(gpt2(), 0.5).load(average.tensors())


def test_an_average_of_sixteen_bits_does_not_stand_still() -> None:
    model = torch.nn.Linear(4, 4).bfloat16()
    average = WeightAverage(model, 0.999)
    before = average.tensors()["weight"].clone()
    moved(model, 1)
    for step in range(50_000, 50_010):
        average.update(step)
    target = model.weight.detach().float()
    torch.testing.assert_close(average.tensors()["weight"], target + 0.999**10 * (before - target))


def record(step: int, nll: float) -> EvalRecord:
    return EvalRecord(step=step, nll=nll, perplexity=0.0, tokens=1)


def test_the_best_model_is_kept_and_patience_ends() -> None:
    model = llama()
    best = BestModel(model, keep=True, patience=2, threshold=0.1)
    weights = {}
    for step, nll in ((0, 3.0), (1, 2.5), (2, 2.45), (3, 2.6)):
        moved(model, step)
        weights[step] = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert not best.should_stop
        best.see(record(step, nll))
    assert best.should_stop  # 2.45 is better than 2.5, but not by 0.1
    assert best.step == 2
    best.give()
    assert all(torch.equal(parameter, weights[2][name]) for name, parameter in model.named_parameters())


def test_the_best_model_survives_a_checkpoint() -> None:
    model = llama()
    best = BestModel(model, keep=True, patience=0, threshold=0.0)
    best.see(record(0, 2.0))
    again = BestModel(llama(), keep=True, patience=0, threshold=0.0)
    again.load(best.tensors())
    again.recall([record(0, 2.0)])
    moved(model, 1)
    again.see(record(1, 2.5))
    assert again.step == 0
    assert not again.should_stop
    with pytest.raises(TrainingError, match="does not hold the weights of its best evaluation, after step 0"):
        BestModel(llama(), keep=True, patience=0, threshold=0.0).recall([record(0, 2.0)])
    with pytest.raises(TrainingError, match="other parameters"):
        BestModel(gpt2(), keep=True, patience=0, threshold=0.0).load(best.tensors())


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.3, 2.0)])
def test_distillation_is_its_formula(weight: float, temperature: float) -> None:
    teacher, student = llama(), llama()
    moved(student, 3)
    batch = CausalLM().batch(
        [{"input_ids": block["input_ids"][: 5 + 3 * n]} for n, block in enumerate(random_blocks(3))]
    )
    teacher.train()
    found = Distillation(teacher, weight, temperature).summed(student, batch, autocast=nullcontext())
    assert teacher.training
    labels = batch["labels"].flatten()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        p, q = (model(**inputs).logits.flatten(0, 1) for model in (teacher, student))
    total = 0.0
    for n in range(len(labels)):
        if labels[n] == -100:
            continue
        soft = functional.softmax(p[n].double() / temperature, -1)
        kl = (soft * (soft.log() - functional.log_softmax(q[n].double() / temperature, -1))).sum()
        ce = -functional.log_softmax(q[n].double(), -1)[labels[n]]
        total += float((1 - weight) * ce + weight * temperature**2 * kl)
    assert float(found.detach()) == pytest.approx(total, rel=1e-5)
    found.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    teacher = llama()
    teacher.resize_token_embeddings(99)
    with pytest.raises(ConfigurationError, match="the teacher knows 99 tokens, the student 96"):
        Distillation(teacher, 0.5).summed(llama(), CausalLM().batch(random_blocks(2)), autocast=nullcontext())


def test_peak_memory_sees_what_was_there_for_a_moment() -> None:
    code = """
import torch
from hf_geglu.training.memory import peak_memory
with peak_memory(torch.device("cpu")) as without:
    pass
with peak_memory(torch.device("cpu")) as peak:
    for _ in range(3):
        torch.ones(64, 2**20)  # 256 MB
print(without.bytes, peak.bytes)
"""  # in a process of its own: here an earlier test may have left memory that is taken again
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    without, peak = map(int, result.stdout.split())
    assert 240e6 < peak - without < 600e6


@pytest.mark.parametrize("limit", [0.5, math.inf])
def test_gradients_are_scaled_as_torch_does_and_left_alone_below_the_limit(limit: float) -> None:
    torch.manual_seed(0)
    model, twin = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for parameter, other in list(zip(model.parameters(), twin.parameters(), strict=True))[1:]:  # one has no gradient
        parameter.grad = torch.randn_like(parameter)
        other.grad = parameter.grad.clone()
    versions = {name: p.grad._version for name, p in model.named_parameters() if p.grad is not None}
    accelerator = make_accelerator(TrainSettings(max_steps=1, use_cpu=True))
    norm = clip_gradients(model, limit, accelerator)
    assert norm == float(torch.nn.utils.clip_grad_norm_(twin.parameters(), limit))
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert parameter.grad is other.grad is None or torch.equal(parameter.grad, other.grad)
    touched = {
        parameter.grad._version > versions[name] for name, parameter in model.named_parameters() if name in versions
    }
    assert touched == {limit == 0.5}
