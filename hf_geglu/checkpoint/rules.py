"""What transformers makes of a checkpoint's tensors: which parameter each becomes, in which dtype, and what it is
called when it is saved again.

Loading rules are private to transformers and differ between versions 4 and 5; they are touched here and nowhere else.
Saving is observed: a weightless model saves tensors of one number each, and we look where the numbers went.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from hf_geglu.errors import WeightsError

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
except ImportError:  # transformers 4: renamings are methods of the model
    get_model_conversion_mapping = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """Where a stored tensor goes."""

    parameter: str
    """Name of the parameter or buffer; for a merge, of the first one it contributes to."""
    converter: Any = None
    """What merges it with others or splits it (transformers 5), None where it is only renamed."""
    pattern: str | None = None
    """Which of the converter's sources it is."""


def arrivals(model: nn.Module, names: Iterable[str]) -> dict[str, Arrival]:
    """For each stored tensor that this class would load, where it goes. Those it would drop are left out.

    Notes on `model` which renamings were used, as loading does, so that saving undoes those.

    Args:
        model: without weights.
        names: of the stored tensors.

    Raises:
        WeightsError: two stored tensors become the same parameter.
    """
    rule = _rule_4 if get_model_conversion_mapping is None else _rule_5
    found = rule(model, sorted(names))
    known = set(model.state_dict())
    kept = {name: arrival for name, arrival in found.items() if arrival.parameter in known}
    taken: dict[str, str] = {}
    for name, arrival in kept.items():
        if arrival.converter is None and arrival.parameter in taken:
            raise WeightsError(
                f"{taken[arrival.parameter]} and {name} are both {arrival.parameter} of {type(model).__name__}; the "
                "checkpoint holds it twice, remove one"
            )
        taken[arrival.parameter] = name
    return kept


def _rule_5(model: Any, names: list[str]) -> dict[str, Arrival]:
    """``transformers.core_model_loading.convert_and_load_state_dict_in_model``, step 1, without tensors."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, known = model.base_model_prefix, model.state_dict()
    found = {}
    for name in sorted(names, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if parameter not in known and name in known:
            parameter, pattern = rename_source_key(name, [], [], prefix, known)
        found[name] = Arrival(parameter, by_pattern[pattern] if pattern is not None else None, pattern)
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    return found


def _rule_4(model: Any, names: list[str]) -> dict[str, Arrival]:
    """``PreTrainedModel._load_pretrained_model`` of transformers 4, as far as names go."""
    from transformers.modeling_utils import VLMS

    prefix = model.base_model_prefix
    stored = any(name.startswith(prefix) for name in names) if prefix else False
    expected = hasattr(model, prefix) if prefix else False
    speaks = any(word in kind.__name__.lower() for kind in type(model).__mro__[:-1] for word in VLMS)
    renamed = model._get_key_renaming_mapping(
        names,
        model._checkpoint_conversion_mapping if speaks else None,
        stored and not expected,
        not stored and expected,
    )
    return {name: Arrival(parameter) for name, parameter in renamed.items()}


def note_dtype(config: Any, dtype: torch.dtype, *, asked: bool) -> None:
    """Write the dtype of loading into a config, where `from_pretrained` does.

    Args:
        config: changed.
        dtype: of loading.
        asked: the caller named it; transformers 4 leaves nested configs alone where it found it out by itself.
    """
    config.dtype = dtype
    if get_model_conversion_mapping is None and not asked:
        return
    for name in getattr(config, "sub_configs", ()):
        if getattr(config, name, None) is not None:
            getattr(config, name).dtype = dtype


def compute_buffers(model: Any) -> None:
    """Compute the buffers that are not saved as loading leaves them: version 5 computes them once more, in float32.

    Args:
        model: built with its buffers, its parameters on the meta device.
    """
    if get_model_conversion_mapping is None:
        return
    for module in model.modules():
        if any(module._buffers[name] is not None for name in module._non_persistent_buffers_set):
            model._init_weights(module)


def note_generation(model: Any, folder: Path) -> None:
    """Give a model the generation config that loading it from `folder` would.

    Raises:
        WeightsError: it cannot be read.
    """
    if not model.can_generate():
        return
    from transformers import GenerationConfig

    try:
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        elif (
            get_model_conversion_mapping is not None
        ):  # version 5 takes what older configs say of generation out of them
            model.generation_config = GenerationConfig.from_pretrained(
                folder, config_file_name="config.json", _from_model_config=True
            )
    except Exception as error:  # it validates itself in many ways
        raise WeightsError(f"the generation config cannot be read: {error}") from error


def loaded_dtypes(model: Any, dtype: torch.dtype) -> Callable[[str, torch.dtype], torch.dtype]:
    """In which dtype ``from_pretrained(dtype=dtype)`` holds a parameter: (its name, as it is stored) -> dtype.

    Args:
        model: without weights, built in `dtype`.
        dtype: what was asked for.
    """
    wide: list[str] = []
    if dtype == torch.float16:
        wide += model._keep_in_fp32_modules or ()
    if dtype in (torch.float16, torch.bfloat16):
        wide += model._keep_in_fp32_modules_strict or ()
    if get_model_conversion_mapping is None:
        patterns = [rf"((^|\.){module}($|\.))" for module in wide]
    else:
        patterns = [module.replace("*", ".*") for module in wide]
    keep = re.compile("|".join(patterns)) if patterns else None
    known = model.state_dict()

    def loaded(parameter: str, stored: torch.dtype) -> torch.dtype:
        if not stored.is_floating_point:
            return stored
        if keep is not None and keep.search(parameter):
            return torch.float32
        held: torch.dtype = known[parameter].dtype
        return held

    return loaded


def save_without_weights(model: Any, folder: Path, tied: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Everything that `save_pretrained` writes but the weights, and what it would call those.

    Args:
        model: of the class that will load the result, without weights.
        folder: where config, generation config and modelling code go.
        tied: parameters that share their numbers with another one -> that one.
        names: of the parameters there are numbers for.

    Returns:
        Saved name -> parameter. Of parameters that share their numbers one stays.
    """
    wanted = list(names)
    tags = {name: torch.tensor([number]) for number, name in enumerate(wanted)}
    state = {name: tags[tied.get(name, name)] for name in wanted}
    model.save_pretrained(folder, state_dict=state)
    saved: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tag in load_file(path).items():
            saved[name] = wanted[int(tag)]
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return saved


def saving_order(model: nn.Module) -> list[str]:
    """The order in which `save_pretrained` goes through parameters when it fills one file after the other."""
    names = list(model.state_dict())
    return names if get_model_conversion_mapping is None else sorted(names, key=dot_natural_key)


def parts_of(model: nn.Module, parameters: Iterable[str]) -> list[str]:
    """What `save_pretrained` takes parameters apart into, in its order (transformers 5).

    Args:
        model: without weights, knowing which conversions its loading used.
        parameters: that are put together from several stored tensors.
    """
    from transformers.core_model_loading import revert_weight_conversion

    known = model.state_dict()
    return list(revert_weight_conversion(model, {name: known[name] for name in parameters}))


def ties_whatever_is_stored() -> bool:
    """Whether loading ties parameters also where the checkpoint stores different numbers for them (transformers 4)."""
    return get_model_conversion_mapping is None
