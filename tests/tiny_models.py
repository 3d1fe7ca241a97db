"""Small random models of many architectures, built from their configurations: nothing is downloaded.

    model = tiny("bert")                                   # as TINY says
    model = tiny("llama", hidden_act="gelu")               # one key of the config changed
    model = tiny("t5", auto=AutoModelForSeq2SeqLM)         # another head

Sizes are chosen so that no two can be confused: hidden 16, intermediate 40 (neither 2 nor 4 times 16), 2 layers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    CLIPModel,
    CLIPVisionModel,
    DetrModel,
    PreTrainedModel,
    SiglipModel,
)

D, F, LAYERS, HEADS, VOCAB = 16, 40, 2, 2, 64
"""Hidden size, intermediate size, layers, heads and vocabulary of nearly all of them."""

_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "head_dim": D // HEADS}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": VOCAB, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, "n_inner": F}
_VIT = {
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 8,
}
_BART = {
    "d_model": D,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": F,
    "decoder_ffn_dim": F,
}
_SEQ2SEQ = {**_BART, **_IDS, "vocab_size": VOCAB, "max_position_embeddings": 32, "decoder_start_token_id": 2}
_T5 = {
    **_IDS,
    "vocab_size": VOCAB,
    "d_model": D,
    "d_kv": 8,
    "d_ff": F,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
_SPEECH = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_WAV2VEC = {
    **_SPEECH,
    "vocab_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_TEXT_TOWER = {**_BERT, "projection_dim": D}
_TOWERS = {"text_config": _TEXT_TOWER, "vision_config": _VIT}

TINY: dict[str, tuple[Any, dict[str, Any]]] = {
    # encoders
    "bert": (AutoModelForMaskedLM, _BERT),
    "roberta": (AutoModelForMaskedLM, {**_BERT, **_IDS}),
    "electra": (AutoModelForMaskedLM, {**_BERT, "embedding_size": 8}),
    "distilbert": (
        AutoModelForMaskedLM,
        {"vocab_size": VOCAB, "dim": D, "hidden_dim": F, "n_layers": LAYERS, "n_heads": HEADS},
    ),
    "albert": (AutoModelForMaskedLM, {**_BERT, "embedding_size": 8}),
    "deberta-v2": (AutoModelForMaskedLM, _BERT),
    "esm": (AutoModelForMaskedLM, {**_BERT, "vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}),
    "modernbert": (AutoModelForMaskedLM, {**_BERT, **_IDS, "cls_token_id": 1, "sep_token_id": 2}),
    # decoders
    "gpt2": (AutoModelForCausalLM, {**_GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_bigcode": (AutoModelForCausalLM, {**_GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neo": (
        AutoModelForCausalLM,
        {
            "vocab_size": VOCAB,
            "hidden_size": D,
            "intermediate_size": F,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 32,
            "window_size": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": (AutoModelForCausalLM, _BERT),
    "gptj": (AutoModelForCausalLM, {**_GPT2, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "codegen": (
        AutoModelForCausalLM,
        {**_GPT2, "n_head": 4, "n_ctx": 32, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "phi": (AutoModelForCausalLM, _BERT),
    "falcon": (AutoModelForCausalLM, {**_BERT, "ffn_hidden_size": F, "bos_token_id": 1, "eos_token_id": 2}),
    "bloom": (AutoModelForCausalLM, {"vocab_size": VOCAB, "hidden_size": D, "n_layer": LAYERS, "n_head": HEADS}),
    "mpt": (
        AutoModelForCausalLM,
        {"vocab_size": VOCAB, "d_model": D, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 32},
    ),
    "opt": (
        AutoModelForCausalLM,
        {
            **_IDS,
            "vocab_size": VOCAB,
            "hidden_size": D,
            "ffn_dim": F,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": D,
        },
    ),
    "llama": (AutoModelForCausalLM, _LLAMA),
    "mistral": (AutoModelForCausalLM, _LLAMA),
    "qwen2": (AutoModelForCausalLM, _LLAMA),
    "qwen3": (AutoModelForCausalLM, _LLAMA),
    "gemma": (AutoModelForCausalLM, _LLAMA),
    "gemma2": (AutoModelForCausalLM, _LLAMA),
    "phi3": (AutoModelForCausalLM, {**_LLAMA, **_IDS}),
    "mixtral": (AutoModelForCausalLM, {**_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}),
    # encoder-decoders
    "t5": (AutoModelForSeq2SeqLM, _T5),
    "mt5": (AutoModelForSeq2SeqLM, _T5),
    "bart": (AutoModelForSeq2SeqLM, _SEQ2SEQ),
    "pegasus": (AutoModelForSeq2SeqLM, _SEQ2SEQ),
    "blenderbot": (AutoModelForSeq2SeqLM, _SEQ2SEQ),
    "m2m_100": (AutoModelForSeq2SeqLM, _SEQ2SEQ),
    # audio
    "whisper": (
        AutoModelForSpeechSeq2Seq,
        {
            **_BART,
            **_IDS,
            "vocab_size": VOCAB,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "decoder_start_token_id": 2,
        },
    ),
    "speech_to_text": (
        AutoModelForSpeechSeq2Seq,
        {**_BART, **_IDS, "vocab_size": VOCAB, "conv_channels": 16, "input_feat_per_channel": 8},
    ),
    "wav2vec2": (AutoModel, _WAV2VEC),
    "wav2vec2-conformer": (AutoModel, _WAV2VEC),
    # vision
    "vit": (AutoModelForImageClassification, _VIT),
    "deit": (AutoModel, _VIT),
    "dinov2": (AutoModel, {**_VIT, "mlp_ratio": 3}),
    "swin": (
        AutoModelForImageClassification,
        {"image_size": 16, "patch_size": 2, "embed_dim": D, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    ),
    "convnext": (AutoModel, {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2}),
    "mobilenet_v2": (AutoModel, {"image_size": 32, "depth_multiplier": 0.25}),
    "detr": (
        DetrModel,
        {
            **_BART,
            "num_queries": 4,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
        },
    ),
    "clip_vision_model": (CLIPVisionModel, _VIT),
    # two towers and composites
    "clip": (CLIPModel, {**_TOWERS, "projection_dim": D}),
    "siglip": (SiglipModel, _TOWERS),
}
"""Model type -> (class to build with, keys of its config)."""


def tiny(model_type: str, *, auto: Any = None, **overrides: Any) -> PreTrainedModel:
    """A random model in eval mode, the same at every call."""
    build, keys = TINY[model_type]
    config = AutoConfig.for_model(model_type, **{**keys, **overrides})
    build = auto or build
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build.from_config(config) if hasattr(build, "from_config") else build(config)
    return model.eval()
