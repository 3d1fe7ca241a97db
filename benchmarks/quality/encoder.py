"""all-MiniLM-L6-v2 (dense GELU): sentence embeddings before and after, on sentences of two domains."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

import hf_geglu
from benchmarks.corpora import corpus
from benchmarks.quality.measuring import interval
from benchmarks.records import write
from hf_geglu.demo.naive import naive_swap
from hf_geglu.demo.weights import minilm_folder
from hf_geglu.planning import make_plan

NEIGHBOURS = 10


def run(*, count: int = 200) -> None:
    """Naive swap and ours, cosine to the original and agreement of the ten nearest neighbours."""
    folder = minilm_folder(progress=print)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder).eval()
    texts = {
        "library": sentences(corpus("library").held_out, count),
        "prose": sentences(corpus("prose").held_out, count),
    }
    before = {name: embeddings(model, tokenizer, each) for name, each in texts.items()}
    plan = make_plan(model)
    torch.manual_seed(0)
    starts = {"naive swap": naive_swap(model, plan), "table (exact)": copy.deepcopy(model)}
    hf_geglu.convert(starts["table (exact)"], plan)
    record: dict[str, Any] = {"model": "all-MiniLM-L6-v2", "sentences": count, "rows": []}
    for start, converted in starts.items():
        figures = {}
        for name, each in texts.items():
            after = embeddings(converted, tokenizer, each)
            figures[name] = {
                "cosine": interval((before[name] * after).sum(dim=1).tolist()),
                "neighbours": interval(agreement(before[name], after).tolist()),
            }
        record["rows"].append({"start": start, "domains": figures})
        print(start, {name: round(each["cosine"]["mean"], 6) for name, each in figures.items()}, flush=True)
    write("quality_encoder", record)


def sentences(texts: tuple[str, ...], count: int) -> list[str]:
    """Single paragraphs of 60 to 400 characters, drawn from many documents."""
    found = [part.strip() for text in texts for part in text.split("\n\n") if 60 <= len(part.strip()) <= 400]
    random.Random(0).shuffle(found)
    return found[:count]


@torch.no_grad()
def embeddings(model: Any, tokenizer: Any, texts: list[str], batch: int = 50) -> torch.Tensor:
    """(N, D), the mean over tokens as the model's card says, of length 1."""
    found = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        inputs = tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        found.append(torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1))
    return torch.cat(found)


def agreement(before_ND: torch.Tensor, after_ND: torch.Tensor) -> torch.Tensor:
    """(N,): share of each text's nearest neighbours before that are among those after."""

    def neighbours(vectors_ND: torch.Tensor) -> torch.Tensor:
        alike = vectors_ND @ vectors_ND.T
        alike.fill_diagonal_(-2.0)
        return alike.topk(NEIGHBOURS, dim=1).indices

    one, other = neighbours(before_ND), neighbours(after_ND)
    return (one[:, :, None] == other[:, None, :]).any(dim=2).float().mean(dim=1)
