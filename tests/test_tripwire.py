"""A plain class that meets a portable variant stops, whatever its config is good for."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny
from transformers import AutoConfig, AutoModelForMaskedLM

import hf_geglu


def test_a_class_that_ignores_its_activation_is_stopped_by_another_entry(tmp_path) -> None:
    """ESM calls GELU itself: no entry of its config names the activation that it uses."""
    model = tiny("esm")
    hf_geglu.convert(model)
    assert list(model.config.geglu["saved"]) == ["hidden_size"]
    assert model.config.hidden_size == model.esm.embeddings.word_embeddings.embedding_dim  # in memory it stays true
    model.save_pretrained(tmp_path)

    written = json.loads((tmp_path / "config.json").read_text())
    assert "import hf_geglu" in written["hidden_size"]
    base = type(model).__mro__[2]
    with pytest.raises(Exception, match=r"hidden_size|geglu|str"):
        base.from_pretrained(tmp_path)

    assert AutoConfig.from_pretrained(tmp_path).hidden_size == model.config.hidden_size
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    ids = torch.arange(4, 12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert json.loads(again.config.to_json_string())["hidden_size"] == written["hidden_size"]


def test_a_class_that_looks_its_activation_up_needs_no_second_one() -> None:
    model = tiny("bert")
    hf_geglu.convert(model)
    assert "saved" not in model.config.geglu
