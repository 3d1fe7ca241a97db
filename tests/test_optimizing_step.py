"""`optimize` also takes norms and causal attention: the same model, no less accurate, and out again."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import nn
from versions import BEFORE_5

import hf_geglu
from hf_geglu.ops import attention
from hf_geglu.ops.norm import rms_norm  # noqa: F401 - compiled once for the module
from hf_geglu.optimizing import norms
from hf_geglu.optimizing.attention import NAME, ConfigView, install_attention

T = 160


@pytest.fixture(autouse=True)
def _small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "FEWEST_ELEMENTS", 1)
    monkeypatch.setattr(attention, "_multiplies_bfloat16", lambda: True)


def llama(**changed: Any) -> Any:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return tiny("llama", max_position_embeddings=512, **sizes, **changed)


def loss_and_gradients(model: Any) -> list[torch.Tensor]:
    ids = torch.arange(2 * T).reshape(2, T) * 7 % 64
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    return [loss.detach().double(), gradients]


@pytest.mark.parametrize("build", [llama, lambda: tiny("gpt2", n_positions=512)], ids=["llama", "gpt2"])
def test_a_step_is_no_less_accurate(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    own = attention.causal_attention
    monkeypatch.setattr("hf_geglu.optimizing.attention.causal_attention", lambda *a: called.append(1) or own(*a))
    narrow = build().bfloat16()
    truth = loss_and_gradients(copy.deepcopy(narrow).double())
    plain = loss_and_gradients(narrow)
    report = hf_geglu.optimize(narrow)
    assert report.attentions == 2
    assert f"{report.norms} norms and 2 attention modules" in str(report)
    found = loss_and_gradients(narrow)
    calls = 0 if BEFORE_5 else 2  # transformers 4 hands a causal mask over, which is torch's to heed
    assert len(called) == calls
    errors, allowed = ([float((a - b).norm()) for a, b in zip(own, truth, strict=True)] for own in (found, plain))
    assert errors[1] <= 2 * allowed[1]
    assert errors[0] <= 2 * allowed[0] + 2.0**-9 * float(truth[0])
    hf_geglu.optimize(narrow, ops="reference")
    for again, before in zip(loss_and_gradients(narrow), plain, strict=True):
        assert torch.equal(again, before)
    assert len(called) == calls


def test_norms_are_told_by_what_they_compute() -> None:
    assert len(norms.norm_recipes(llama())) == 5
    assert norms.norm_recipes(tiny("gemma")) == {}  # (1 + weight), rounded elsewhere
    assert norms.norm_recipes(tiny("gpt2")) == {}
    model = llama()
    model.model.norm.register_forward_hook(lambda *_: None)
    assert len(norms.norm_recipes(model)) == 4


def test_attention_of_encoders_and_masks_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install_attention(tiny("bert")) == 0
    model = llama().bfloat16()
    ids, mask = torch.arange(T)[None] % 64, torch.ones(1, T, dtype=torch.long)
    mask[:, :9] = 0
    before = model(input_ids=ids, attention_mask=mask).logits
    install_attention(model)
    monkeypatch.setattr("hf_geglu.optimizing.attention.causal_attention", lambda *_: 1 / 0)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)  # padding
    short = model(input_ids=ids[:, :40]).logits
    assert short.shape == (1, 40, 64)
    model.set_attn_implementation("eager")
    assert model(input_ids=ids, output_attentions=True).attentions[0].shape[-1] == T
    model.set_attn_implementation("sdpa")
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids)


def test_config_copies_and_pickles(tmp_path: Any) -> None:
    model = llama()
    beside = type(model)(model.config)  # shares the config
    hf_geglu.optimize(model)
    assert isinstance(model.model.layers[0].self_attn.config, ConfigView)
    assert model.model.layers[0].self_attn.config._attn_implementation == NAME
    assert beside.model.layers[0].self_attn.config is model.config
    assert model.config._attn_implementation == "sdpa"
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].self_attn.config._hf_geglu_config is twin.config
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again: nn.Module = torch.load(stream, weights_only=False)
    assert again.model.layers[0].self_attn.config._attn_implementation == NAME
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert type(model).from_pretrained(tmp_path).model.layers[0].self_attn.config._attn_implementation == "sdpa"


def test_attention_with_a_bias_of_positions_is_torchs():
    """T5 under transformers 5 hands its bias over as a tensor."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, feed_forward_proj="gated-gelu")).eval()
    inputs = {"input_ids": torch.arange(2, 12)[None], "decoder_input_ids": torch.arange(2, 9)[None]}
    with torch.no_grad():
        before = model(**inputs).logits
        hf_geglu.optimize(model, ops="lean")
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-6)
