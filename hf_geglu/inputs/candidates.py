"""Which arguments a forward is given: sets of them, the likeliest first, and a trial that says which one is right."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_geglu.inputs.values import Pixels, Sound, Source, Text, make
from hf_geglu.modes import evaluating

_MODALITIES = (
    "input_ids",
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "input_values",
    "bbox",
    "flattened_patches",
    "states",
    "actions",
    "rewards",
    "returns_to_go",
    "timesteps",
)
_DESCRIPTIONS = (
    "image_grid_thw",
    "grid_thw",
    "input_features_mask",
    "attention_mask",
    "visual_feats",
    "visual_pos",
    "future_values",
    "future_time_features",
    "token_type_ids",
    "encoder_hidden_states",
    "spatial_shapes",
    "target_sizes",
    "pixel_attention_mask",
    "lang_ids",
)
"""What goes with a modality in some models and is refused by none that names it."""


def synthetic_inputs(model: nn.Module, *, seed: int = 0) -> dict[str, Any] | None:
    """Keyword arguments of one forward of `model`, on its device and in its dtype; None where nothing that its config
    and its signature suggest can be run.

    Tokens are uniform over the vocabulary, pixels and audio are N(0, 1), from a generator of their own (`seed`). The
    model says which suggestion is right: each is tried, in eval mode and without gradients, until one gives a
    floating-point output that is not all NaN.
    """
    for inputs in candidate_inputs(model, seed=seed):
        try:
            with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
                output = model(**inputs)
        except Exception:  # whatever a model has against made-up inputs; the next suggestion may do
            continue
        if any(_says_something(tensor) for tensor in _tensors(output)):
            return inputs
    return None


def candidate_inputs(model: nn.Module, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Sets of keyword arguments that might suit `model.forward`, the likeliest first, none twice."""
    config: Any = getattr(model, "config", None)
    parameter = next(model.parameters(), None)
    if config is None or parameter is None:
        return
    seen: list[set[tuple[str, tuple[int, ...]]]] = []
    for names, flags in _sets(model, config):
        for form in _forms(names, streams=Source(config=config, generator=torch.Generator()).look_up("num_codebooks")):
            generator = torch.Generator().manual_seed(seed)
            inputs: dict[str, Any] = {}
            for name in names:
                own = form if name == _last_tokens(names) else {**form, "text": "tokens"}
                value = make(name, Source(config=config, generator=generator, **own))
                if value is None:
                    break
                dtype = parameter.dtype if value.is_floating_point() else None
                inputs[name] = value.to(parameter.device, dtype)
            else:
                shapes = {(name, tuple(value.shape)) for name, value in inputs.items()} | {(name, ()) for name in flags}
                if inputs and shapes not in seen:
                    seen.append(shapes)
                    yield inputs | flags


def _sets(model: nn.Module, config: Any) -> Iterator[tuple[list[str], dict[str, bool]]]:
    """Names of arguments, and flags that go with them."""
    parameters = inspect.signature(model.forward).parameters
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind <= parameter.POSITIONAL_OR_KEYWORD
    ]
    known = [name for name in parameters if name in _MODALITIES]
    main = getattr(model, "main_input_name", None)
    main_names = [name for name in ([main] if isinstance(main, str) else main or []) if name in parameters]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        main_names.append("decoder_input_ids")
    if hasattr(config, "text_config") and hasattr(config, "vision_config") and _is_two_tower(model):
        main_names = [name for name in ("input_ids", "pixel_values") if name in parameters]
    described = [name for name in parameters if name in _DESCRIPTIONS]
    choices = [
        _union(main_names, required),
        required,
        known[:1],
        _union(known, required),
        _union(known, required, main_names, described),
        _union(main_names, required, described),
    ]
    accepts_flags = "use_cache" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for flags in ({}, {"use_cache": False}) if accepts_flags and hasattr(config, "use_cache") else ({},):
        for names in choices:
            if names:
                yield names, flags


def _union(*parts: list[str]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in part))


def _is_two_tower(model: nn.Module) -> bool:
    """CLIP-like: both towers run on every call (a vision-language model can do without the picture)."""
    return hasattr(model, "text_model") and hasattr(model, "vision_model")


def _last_tokens(names: list[str]) -> str | None:
    """The tokens that may come in several streams: the decoder's, where there are two."""
    return next((name for name in ("decoder_input_ids", "input_ids") if name in names), None)


def _forms(names: list[str], *, streams: object) -> Iterator[dict[str, Any]]:
    """The forms that pictures, sounds and tokens among these arguments may take."""
    pictures = any(name in ("pixel_values", "hidden_states") for name in names)
    gridded = any(name.endswith("grid_thw") for name in names)
    pixel_forms: list[Pixels] = ["pictures"]
    if pictures:
        pixel_forms = ["patches", "pictures"] if gridded else ["pictures", "lists", "video"]
        if any(name in ("spatial_shapes", "pixel_attention_mask", "target_sizes") for name in names):
            pixel_forms = ["patch lists", *pixel_forms]
    sounding = any(name in ("input_values", "input_features", "spectrogram", "audio_mel") for name in names)
    sound_forms: list[Sound] = ["frames first", "bands first", "mono", "waveform"] if sounding else ["frames first"]
    text_forms: list[Text] = ["tokens"]
    if streams is not None and _last_tokens(names) is not None:
        text_forms = ["tokens", "flat codebooks", "codebooks first", "codebooks last"]
    for sound in sound_forms:
        for pixels in pixel_forms:
            for text in text_forms:
                yield {"pixels": pixels, "sound": sound, "text": text}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _says_something(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    return tensor.is_meta or not bool(tensor.isnan().all())
