"""Synthetic inputs for a whole model, from what its config says of its shapes.

For verifications where the user hands in none. Text, vision and audio models, encoder-decoders and two-tower models;
where a config does not say enough, the caller is told so and verifies site by site.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Inputs = Mapping[str, Any]

BATCH, TOKENS = 2, 16


def synthetic_inputs(model: nn.Module, *, seed: int = 0) -> dict[str, torch.Tensor] | None:
    """Keyword arguments for one forward of `model`, on its device and in its dtype; None where its config does not
    tell.

    Tokens are uniform over the vocabulary, pixels and audio are N(0, 1), from a generator of their own (`seed`).
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    makers = {"input_ids": _tokens, "pixel_values": _pixels, "input_features": _features, "input_values": _waveform}
    names = [main]
    if config.is_encoder_decoder:
        names.append("decoder_input_ids")
    if hasattr(config, "text_config") and hasattr(config, "vision_config") and _is_two_tower(model):
        names = ["input_ids", "pixel_values"]
    inputs: dict[str, torch.Tensor] = {}
    for name in names:
        maker = makers.get(name.removeprefix("decoder_"))
        value = None if maker is None else maker(config, generator)
        if value is None:
            return None
        inputs[name] = value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
    return inputs


def _is_two_tower(model: nn.Module) -> bool:
    """CLIP-like: both towers run on every call (a vision-language model can do without the picture)."""
    return hasattr(model, "text_model") and hasattr(model, "vision_model")


def _lookup(config: Any, *names: str) -> Any:
    """The first of these entries, in the config or in a nested one."""
    nodes = [config, *(getattr(config, name, None) for name in ("text_config", "vision_config", "decoder", "encoder"))]
    for node in nodes:
        for name in names:
            value = getattr(node, name, None)
            if value is not None:
                return value
    return None


def _tokens(config: Any, generator: torch.Generator) -> torch.Tensor | None:
    vocabulary = _lookup(config, "vocab_size")
    if not isinstance(vocabulary, int):
        return None
    # special tokens are usually the first few ids, and a padding id would hide positions from the model
    low = min(4, vocabulary - 1)
    tokens = torch.randint(low, vocabulary, (BATCH, TOKENS), generator=generator)
    # the classification heads of decoders look for the last token that is no padding, CLIP's for the first end of text
    end = _lookup(config, "eos_token_id")
    if isinstance(end, int) and 0 <= end < vocabulary:
        tokens[:, -1] = end
    return tokens


def _pixels(config: Any, generator: torch.Generator) -> torch.Tensor | None:
    size = _lookup(config, "image_size")
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    if size is None:
        size = 64  # convolutional models take any size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = _lookup(config, "num_channels") or 3
    return torch.randn((BATCH, channels, height, width), generator=generator)


def _features(config: Any, generator: torch.Generator) -> torch.Tensor | None:
    bands = _lookup(config, "num_mel_bins")
    if bands is not None:  # Whisper: (B, mel bands, frames), two frames a position
        frames = 2 * int(_lookup(config, "max_source_positions"))
        return torch.randn((BATCH, bands, frames), generator=generator)
    bands = _lookup(config, "input_feat_per_channel", "feature_projection_input_dim")
    return None if bands is None else torch.randn((BATCH, 64, bands), generator=generator)


def _waveform(config: Any, generator: torch.Generator) -> torch.Tensor | None:
    bands = _lookup(config, "num_mel_bins")
    if bands is not None and _lookup(config, "max_length") is not None:  # spectrogram transformers: (B, frames, bands)
        return torch.randn((BATCH, int(_lookup(config, "max_length")), bands), generator=generator)
    return torch.randn((BATCH, 4000), generator=generator)
