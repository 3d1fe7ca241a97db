"""Inputs of model types whose config and signature do not tell them: the zoo's knowledge, which the package has not.

A user of such a model has real inputs, and hands them in (`find_sites(model, inputs=...)`,
`convert(model, inputs=...)`).
Legend of suffixes: B batch, T tokens, D width, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

B, T = 2, 16


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the tensors for one model, the same ones at every call."""

    model: nn.Module
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def config(self) -> Any:
        """Of the model."""
        return self.model.config

    def floats(self, *shape: int) -> torch.Tensor:
        """N(0, 1)."""
        return torch.randn(shape, generator=self.generator)

    def ids(self, *shape: int, below: int = 100, least: int = 4) -> torch.Tensor:
        """Whole numbers, uniform."""
        return torch.randint(least, below, shape, generator=self.generator)

    def pictures(self, height: int, width: int | None = None, *, channels: int = 3, batch: int = B) -> torch.Tensor:
        """(B, C, H, W)."""
        return self.floats(batch, channels, height, width or height)


Inputs = dict[str, Any]


def _bros(m: Maker) -> Inputs:
    return {"input_ids": m.ids(B, T), "bbox": m.floats(B, T, 8).sigmoid()}


def _clap_audio(m: Maker) -> Inputs:
    return {"input_features": m.floats(B, 1, 1024, 64), "is_longer": torch.zeros(B, 1, dtype=torch.bool)}


def _sapiens(m: Maker) -> Inputs:
    return {"pixel_values": m.pictures(64)}


def _mask_decoder(m: Maker) -> Inputs:
    width = 32
    return {
        "image_embeddings": m.floats(1, width, 4, 4),
        "image_positional_embeddings": m.floats(1, width, 4, 4),
        "sparse_prompt_embeddings": m.floats(1, 1, 2, width),
        "dense_prompt_embeddings": m.floats(1, width, 4, 4),
        "multimask_output": True,
    }


def _omdet(m: Maker) -> Inputs:
    return {
        "pixel_values": m.pictures(224),
        "classes_input_ids": m.ids(4, 8),
        "classes_attention_mask": torch.ones(4, 8, dtype=torch.long),
        "tasks_input_ids": m.ids(B, 8),
        "tasks_attention_mask": torch.ones(B, 8, dtype=torch.long),
        "classes_structure": torch.tensor([2, 2]),
    }


def _speech(bands: int, frames: int = 64) -> Callable[[Maker], Inputs]:
    return lambda m: {"input_features": m.floats(B, frames, bands)}


def _pixels(height: int, width: int | None = None) -> Callable[[Maker], Inputs]:
    return lambda m: {"pixel_values": m.pictures(height, width)}


def _codec(m: Maker) -> Inputs:
    return {"input_values": m.floats(B, 1, 6400), "input_features": m.floats(B, 20, 160)}


def _dit(m: Maker) -> Inputs:
    return {
        "hidden_states": m.floats(1, T, m.config.mel_dim),
        "condition_vector": m.floats(1, T, m.config.mel_dim),
        "speaker_embedding": m.floats(1, T, m.config.enc_emb_dim),
        "quantized_code": m.ids(1, T // 2),
        "time_step": torch.tensor(0.5),
    }


def _token2wav(m: Maker) -> Inputs:
    dit = m.config.dit_config
    return {
        "code": m.ids(1, T // 2),
        "conditioning": m.floats(1, dit.enc_emb_dim),
        "reference_mel": m.floats(1, 32, dit.mel_dim),
        "num_steps": 2,
    }


def _with_queries(m: Maker, *, frames: int = 1, qformer: bool = False) -> Inputs:
    """Text with a place for each query of the Q-Former."""
    queries = m.config.num_query_tokens * frames
    places = torch.full((B, queries), m.config.video_token_index if frames > 1 else m.config.image_token_index)
    size = m.config.vision_config.image_size
    pictures = m.floats(B, frames, 3, size, size) if frames > 1 else m.pictures(size)
    inputs = {
        "pixel_values": pictures,
        "input_ids": torch.cat([places, m.ids(B, 8, below=20)], dim=1),
        "attention_mask": torch.ones(B, queries + 8, dtype=torch.long),
    }
    return inputs | ({"qformer_input_ids": m.ids(B, 8)} if qformer else {})


def _patches(values: int, *, more: Inputs | None = None) -> Callable[[Maker], Inputs]:
    """Flattened patches of one picture of 4 x 4."""
    return lambda m: {"pixel_values": m.floats(16, values), "grid_thw": torch.tensor([[1, 4, 4]]), **(more or {})}


def _embeddings(m: Maker) -> Inputs:
    return {"inputs_embeds": m.floats(B, T, m.config.hidden_size)}


def _tiles(m: Maker) -> Inputs:
    size, tiles = m.config.image_size, m.config.max_num_tiles
    return {
        "pixel_values": m.floats(B, 1, tiles, 3, size, size),
        "aspect_ratio_ids": torch.ones(B, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(B, 1, tiles, dtype=torch.long),
    }


def _seggpt(m: Maker) -> Inputs:
    height, width = m.config.image_size
    picture = (height // 2, width)
    return {name: m.pictures(*picture) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def _rag(m: Maker) -> Inputs:
    documents = B * m.config.n_docs
    return {
        "input_ids": m.ids(B, T),
        "context_input_ids": m.ids(documents, T),
        "context_attention_mask": torch.ones(documents, T, dtype=torch.long),
        "doc_scores": m.floats(B, m.config.n_docs),
        "decoder_input_ids": m.ids(B, T),
        "use_cache": False,
    }


def _kosmos(m: Maker) -> Inputs:
    places = torch.zeros(B, T + m.config.latent_query_num, dtype=torch.bool)
    places[:, : m.config.latent_query_num] = True
    size = m.config.vision_config.image_size
    return {
        "pixel_values": m.pictures(size),
        "input_ids": m.ids(B, places.shape[1]),
        "image_embeds_position_mask": places,
    }


def _detr(m: Maker) -> Inputs:
    width = m.config.hidden_size
    return {
        "vision_features": m.floats(1, 16, width),
        "text_features": m.floats(1, 8, width),
        "vision_pos_encoding": m.floats(1, 16, width),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


GIVEN: dict[str, Callable[[Maker], Inputs]] = {
    "bros": _bros,
    "clap_audio_model": _clap_audio,
    "clap": lambda m: {"input_ids": m.ids(B, T), **_clap_audio(m)},
    "clvp": lambda m: {"input_ids": m.ids(B, T), "input_features": m.floats(B, 80, 32)},
    "perceiver": lambda m: {"inputs": m.floats(B, T, m.config.d_model)},
    "oneformer": lambda m: {"pixel_values": m.pictures(64), "task_inputs": m.ids(B, 77)},
    "omdet-turbo": _omdet,
    "gemma4_audio": _speech(128),
    "neucodec": _codec,
    "xcodec2": _codec,
    "qwen2_5_omni_dit": _dit,
    "qwen2_5_omni_bigvgan": lambda m: {"mel_spectrogram": m.floats(1, m.config.mel_dim, 8)},
    "qwen2_5_omni_token2wav": _token2wav,
    "univnet": lambda m: {"input_features": m.floats(1, T, 100), "noise_sequence": m.floats(1, T, 64)},
    "superglue": lambda m: {"pixel_values": m.floats(1, 2, 3, 64, 64)},
    "sapiens2": _sapiens,
    "sam_mask_decoder": lambda m: {**_mask_decoder(m), "attention_similarity": None},
    "sam_hq_mask_decoder": lambda m: {**_mask_decoder(m), "hq_token_only": False},
    "dots3_note_audio_encoder": lambda m: {
        "input_features": m.floats(1, 128, 64),
        "chunk_sample_lengths": torch.tensor([64 * 160]),
    },
    "rf_detr": _pixels(112),
    "lw_detr": _pixels(128),
    "lw_detr_vit": _pixels(128),
    "depth_pro": _pixels(224),
    "janus_vqgan": _pixels(64),
    "blip-2": _with_queries,
    "instructblip": lambda m: _with_queries(m, qformer=True),
    "instructblipvideo": lambda m: _with_queries(m, frames=2, qformer=True),
    "dia_decoder": lambda m: {
        "input_ids": m.ids(B, T, m.config.num_channels),
        "encoder_hidden_states": m.floats(B, T, m.config.cross_hidden_size),
    },
    "florence_vision": lambda m: {"hidden_states": m.pictures(64)},
    "fun_asr_nano_encoder": lambda m: {
        "input_features": m.floats(B, 64, 560),
        "input_features_mask": torch.ones(B, 64, dtype=torch.long),
    },
    "gemma3n_audio": lambda m: {
        "audio_mel": m.floats(B, 64, 128),
        "audio_mel_mask": torch.zeros(B, 64, dtype=torch.bool),
    },
    "gemma4_vision": lambda m: {
        "pixel_values": m.floats(B, 36, 3 * m.config.patch_size**2),
        "pixel_position_ids": torch.stack([torch.arange(36) % 6, torch.arange(36) // 6], dim=-1).expand(B, 36, 2),
    },
    "granite_speech5_ctc": _speech(320),
    "granite_speech5_encoder": _speech(320),
    "granite_speech_encoder": lambda m: {"hidden_states": m.floats(B, 64, 160)},
    "granite_speech_plus_encoder": lambda m: {"hidden_states": m.floats(B, 64, 160)},
    "idefics": lambda m: {
        "input_ids": m.ids(B, T),
        "pixel_values": m.floats(B, 1, 3, m.config.vision_config.image_size, m.config.vision_config.image_size),
        "image_attention_mask": torch.ones(B, T, 1, dtype=torch.long),
        "use_cache": False,
    },
    "kosmos-2": _kosmos,
    "kyutai_speech_to_text": lambda m: {"input_ids": m.ids(B, T, m.config.num_codebooks + 1)},
    "mimi": lambda m: {"input_values": m.floats(B, 1, 7680)},
    "mimi_decoder": lambda m: {"latents": m.floats(B, 512, 8)},
    "pocket_tts_audio_tokenizer_decoder": lambda m: {"latents": m.floats(B, 512, 8)},
    "mllama_vision_model": _tiles,
    "muse_glimmer_vision": _patches(1176),
    "muse_spark_vision": _patches(1176),
    "nemotron3_5_transcribe_audio": _speech(128),
    "paddleocr_vl_vision": lambda m: {
        "pixel_values": m.floats(1, 16, 3, 14, 14),
        "grid_thw": torch.tensor([[1, 4, 4]]),
    },
    "qwen2_5_omni_audio_encoder": lambda m: {
        "input_features": m.floats(128, 200),
        "feature_lens": torch.tensor([200]),
        "aftercnn_lens": torch.tensor([100]),
    },
    "qwen3_omni_moe_audio_encoder": lambda m: {
        "input_features": m.floats(128, 200),
        "feature_lens": torch.tensor([200]),
    },
    "qwen3_asr_encoder": lambda m: {
        "input_features": m.floats(B, 128, 200),
        "input_features_mask": torch.ones(B, 200, dtype=torch.long),
    },
    "qwen3_omni_moe_talker_text": _embeddings,
    "qwen3_omni_moe_talker_code_predictor": _embeddings,
    "qwen4_exp": lambda m: {"input_ids": m.ids(B, T), "use_cache": False},
    "rag": _rag,
    "sam3_detr_decoder": _detr,
    "sam3_lite_text_detr_decoder": _detr,
    "seggpt": _seggpt,
    "speech-encoder-decoder": lambda m: {"input_values": m.floats(B, 4800), "decoder_input_ids": m.ids(B, T)},
    "speecht5": lambda m: {
        "input_values": m.floats(B, T, m.config.hidden_size),
        "decoder_input_values": m.floats(B, T, m.config.hidden_size),
    },
    "timesfm": lambda m: {
        "past_values": m.floats(B, 64),
        "past_values_padding": torch.zeros(B, 64),
        "freq": torch.zeros(B, 1, dtype=torch.long),
    },
    "vibevoice_acoustic_tokenizer_encoder": lambda m: {"hidden_states": m.floats(B, 1, 3200)},
    "vibevoice_acoustic_tokenizer_decoder": lambda m: {"hidden_states": m.floats(B, m.config.hidden_size, 8)},
    "vibevoice_diffusion": lambda m: {
        "noisy_images": m.floats(B, 64),
        "timesteps": torch.tensor([1.0, 2.0]),
        "condition": m.floats(B, 32),
    },
    "video_llama_3_vision": _patches(768, more={"merge_sizes": torch.tensor([1])}),
    "xclip_vision_model": lambda m: {"pixel_values": m.pictures(m.config.image_size, batch=m.config.num_frames)},
}
"""Model type -> the keyword arguments of one forward."""
