"""One argument of a forward by its name: what its values and its shape must be like, as far as the config tells.

Shapes: B `BATCH`, T `TOKENS`, D hidden size, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Inputs = Mapping[str, Any]

BATCH, TOKENS = 2, 16

Pixels = Literal["pictures", "lists", "video", "patches", "patch lists"]
"""(B, C, H, W), (B, 1, C, H, W), (B, frames, C, H, W), flattened patches (N, values) beside their grid, or
(B, N, values) beside a mask."""

Sound = Literal["frames first", "bands first", "mono", "waveform"]
"""(B, frames, bands), (B, bands, frames), (B, 1, samples), (B, samples)."""

Text = Literal["tokens", "flat codebooks", "codebooks first", "codebooks last"]
"""(B, T); for models that read several streams of tokens (B K, T), (B, K, T) or (B, T, K)."""

_NESTED = ("text_config", "vision_config", "audio_config", "encoder_config", "decoder", "encoder", "backbone_config")
FRAMES = 64
SAMPLES = 4800
PICTURE = 64
"""Height and width where the config names none: what is convolutional takes any."""
GRID = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where values come from: the config, a generator of its own, and which form pictures and sounds take."""

    config: Any
    generator: torch.Generator
    pixels: Pixels = "pictures"
    sound: Sound = "frames first"
    text: Text = "tokens"

    def randn(self, *shape: int) -> torch.Tensor:
        """N(0, 1)."""
        return torch.randn(shape, generator=self.generator)

    def look_up(self, *names: str) -> Any:
        """The first of these entries in the config or, failing that, in a nested one."""
        for node in (self.config, *(getattr(self.config, name, None) for name in _NESTED)):
            for name in names:
                try:
                    value = getattr(node, name, None)
                except (AttributeError, ValueError, RuntimeError):  # an entry that exists layer by layer only
                    continue
                if value is not None:
                    return value
        return None

    def number(self, *names: str, default: int) -> int:
        """A whole number of the config."""
        value = self.look_up(*names)
        return int(value) if isinstance(value, int) and not isinstance(value, bool) else default

    @property
    def hidden(self) -> int:
        """D."""
        return self.number("hidden_size", "d_model", "n_embd", "dim", "embed_dim", default=32)


Maker = Callable[[Source], "torch.Tensor | None"]


def make(name: str, source: Source) -> torch.Tensor | None:
    """The argument of that name; None where nothing tells what it is like."""
    if name == "hidden_states" and source.pixels == "patches":
        return pixels(source)  # what the vision towers of Qwen-VL call them
    plain = name.removeprefix("decoder_").removeprefix("qformer_").removeprefix("encoder_")
    for maker_name in (name, plain):
        if maker_name in _MAKERS:
            return _MAKERS[maker_name](source)
    if name.endswith("input_ids") or name in ("inputs", "task_inputs"):
        return tokens(source)
    if name.endswith(("attention_mask", "padding_mask")):
        return torch.ones(BATCH, TOKENS, dtype=torch.long)
    if name.endswith(("embeds", "hidden_states", "hidden_state")) or name in ("context", "latents", "image_features"):
        return source.randn(BATCH, TOKENS, source.hidden)
    return None


def tokens(source: Source) -> torch.Tensor | None:
    """Uniform over the vocabulary, in the form that `source` is about."""
    ids = _plain_tokens(source)
    streams = source.number("num_codebooks", "num_channels", default=1)
    if source.text == "flat codebooks":
        return ids.repeat_interleave(streams, dim=0)
    if source.text == "codebooks first":
        return ids[:, None].repeat(1, streams, 1)
    if source.text == "codebooks last":
        return ids[:, :, None].repeat(1, 1, streams)
    return ids


def _plain_tokens(source: Source) -> torch.Tensor:
    vocabulary = source.look_up("vocab_size")
    if not isinstance(vocabulary, int):
        vocabulary = 256  # characters (CANINE), or a vocabulary that goes by another name
    # special tokens are usually the first few ids, and a padding id would hide positions from the model
    low = min(4, vocabulary - 1)
    ids = torch.randint(low, vocabulary, (BATCH, TOKENS), generator=source.generator)
    # the classification heads of decoders look for the last token that is no padding, CLIP's for the first end of text
    end = source.look_up("eos_token_id")
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[:, -1] = end
    for name in ("image_token_id", "video_token_id", "audio_token_id", "image_token_index"):
        placeholder = source.look_up(name)
        if isinstance(placeholder, int):  # it would stand for features that are not there
            ids[ids == placeholder] = low if placeholder != low else low + 1
    return ids


def pixels(source: Source) -> torch.Tensor:
    """Pictures in the form that `source` is about."""
    height, width = _picture_size(source)
    channels = source.number("num_channels", "in_channels", "in_chans", default=3)
    if source.pixels == "patches":
        patch = source.number("patch_size", default=14)
        time = source.number("temporal_patch_size", default=1)
        return source.randn(GRID * GRID, channels * time * patch * patch)
    if source.pixels == "patch lists":
        return source.randn(BATCH, GRID * GRID, channels * source.number("patch_size", default=14) ** 2)
    if source.pixels == "lists":
        return source.randn(BATCH, 1, channels, height, width)
    if source.pixels == "video":
        return source.randn(BATCH, source.number("num_frames", "frames_per_clip", default=2), channels, height, width)
    return source.randn(BATCH, channels, height, width)


def _picture_size(source: Source) -> tuple[int, int]:
    size = source.look_up("image_size", "input_size")
    if isinstance(size, Mapping):
        size = (size.get("height", PICTURE), size.get("width", PICTURE))
    if isinstance(size, list | tuple):
        numbers = [side for side in size if isinstance(side, int)]
        size = (numbers[-2], numbers[-1]) if len(numbers) > 1 else None
    if size is None:
        size = PICTURE
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def features(source: Source) -> torch.Tensor:
    """Spectrograms."""
    bands = source.number(
        "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels", "input_dim", default=80
    )
    positions = source.look_up("max_source_positions")
    frames = 2 * positions if isinstance(positions, int) and positions < 4096 else FRAMES  # Whisper: two a position
    if source.sound == "bands first":
        return source.randn(BATCH, bands, frames)
    return source.randn(BATCH, frames, bands)


def waveform(source: Source) -> torch.Tensor:
    """Sound, or the spectrograms that some models call input values."""
    bands, length = source.look_up("num_mel_bins"), source.look_up("max_length")
    if isinstance(bands, int) and isinstance(length, int):  # spectrogram transformers
        return source.randn(BATCH, length, bands)
    if source.sound == "mono":
        return source.randn(BATCH, source.number("audio_channels", default=1), SAMPLES)
    return source.randn(BATCH, SAMPLES)


def _boxes(_: Source) -> torch.Tensor:
    """(B, T, 4): left, top, right, bottom, small enough for every table of positions."""
    corners = torch.arange(TOKENS).view(1, TOKENS, 1).expand(BATCH, TOKENS, 4) % 8
    return corners + torch.tensor([0, 0, 4, 4])


def _grid(_: Source) -> torch.Tensor:
    return torch.tensor([[1, GRID, GRID]])


def _flattened_patches(source: Source) -> torch.Tensor:
    """(B, T, 2 + values of a patch): row, column, values."""
    patch, channels = source.number("patch_size", default=16), source.number("num_channels", default=3)
    values = source.number("patch_embed_hidden_size", default=channels * patch * patch)
    places = torch.stack([torch.arange(TOKENS) // GRID + 1, torch.arange(TOKENS) % GRID + 1], dim=-1).float()
    return torch.cat([places.expand(BATCH, -1, -1), source.randn(BATCH, TOKENS, values)], dim=-1)


def _history(source: Source) -> int:
    """Time steps: the context, and before it what the longest lag looks back to."""
    lags = source.look_up("lags_sequence") or [0]
    return source.number("context_length", "prediction_length", default=TOKENS) + int(max(lags))


def _past_values(source: Source) -> torch.Tensor:
    channels = source.look_up("num_input_channels")
    if isinstance(channels, int):  # patched forecasters: (B, steps, channels)
        return source.randn(BATCH, _history(source), channels)
    size = source.number("input_size", default=1)
    return source.randn(BATCH, _history(source), *([] if size == 1 else [size]))


def _past_time_features(source: Source) -> torch.Tensor:
    return source.randn(BATCH, _history(source), source.number("num_time_features", default=0))


def _past_observed_mask(source: Source) -> torch.Tensor:
    return torch.ones_like(_past_values(source))


def _future_time_features(source: Source) -> torch.Tensor:
    steps = source.number("prediction_length", default=TOKENS)
    return source.randn(BATCH, steps, source.number("num_time_features", default=0))


def _future_values(source: Source) -> torch.Tensor:
    return source.randn(BATCH, source.number("prediction_length", default=TOKENS))


_MAKERS: dict[str, Maker] = {
    "input_ids": tokens,
    "pixel_values": pixels,
    "pixel_values_videos": lambda source: pixels(
        Source(config=source.config, generator=source.generator, pixels="video")
    ),
    "image": pixels,
    "input_features": features,
    "audio_mel": features,
    "spectrogram": features,
    "input_features_mask": lambda source: torch.ones(BATCH, max(features(source).shape[1:]), dtype=torch.long),
    "audio_mel_mask": lambda source: torch.zeros(BATCH, FRAMES, dtype=torch.bool),
    "input_values": waveform,
    "input": pixels,
    "bbox": _boxes,
    "visual_bbox": _boxes,
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "token_type_ids": lambda _: torch.zeros(BATCH, TOKENS, dtype=torch.long),
    "flattened_patches": _flattened_patches,
    "spatial_shapes": lambda _: torch.full((BATCH, 2), GRID),
    "target_sizes": lambda _: torch.full((BATCH, 2), GRID),
    "pixel_attention_mask": lambda _: torch.ones(BATCH, GRID * GRID, dtype=torch.long),
    "lang_ids": lambda _: torch.zeros(BATCH, dtype=torch.long),
    "pixel_mask": lambda source: torch.ones(BATCH, *_picture_size(source), dtype=torch.long),
    "visual_feats": lambda source: source.randn(BATCH, TOKENS, source.number("visual_feat_dim", default=32)),
    "visual_pos": lambda source: source.randn(BATCH, TOKENS, source.number("visual_pos_dim", default=4)),
    "past_values": _past_values,
    "past_time_features": _past_time_features,
    "past_observed_mask": _past_observed_mask,
    "future_values": _future_values,
    "future_time_features": _future_time_features,
    "states": lambda source: source.randn(BATCH, TOKENS, source.number("state_dim", default=17)),
    "actions": lambda source: source.randn(BATCH, TOKENS, source.number("act_dim", default=4)),
    "rewards": lambda source: source.randn(BATCH, TOKENS, 1),
    "returns_to_go": lambda source: source.randn(BATCH, TOKENS, 1),
    "timesteps": lambda _: torch.arange(TOKENS).expand(BATCH, TOKENS),
}
