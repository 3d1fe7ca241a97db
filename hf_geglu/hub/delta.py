"""Small artefacts: a plan and the tensors that differ from what it makes of the base, megabytes instead of gigabytes.

    save_delta(model, "out", base="org/model")          a variant whose value branch was trained, or that has a LoRA
    model = load_delta(AutoModelForCausalLM, "out")     base + plan + delta: the full variant, bit for bit

Which tensors differ is not believed but found: the base is converted again and compared, tensor by tensor. Of a
tensor that changed in some rows or columns only (the value half of a packed projection) just these are kept. Values
are stored, not differences, so that what comes back has the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hf_geglu.converting import convert
from hf_geglu.errors import HfGegluError, ManifestError
from hf_geglu.files import whole_folder
from hf_geglu.fingerprint import Fingerprint, fingerprint
from hf_geglu.hub.fits import read_fits
from hf_geglu.hub.manifest import FOLDER, Manifest, read_manifest
from hf_geglu.hub.papers import known_fits, known_provenance, source_folder, write_papers
from hf_geglu.hub.sources import check_base, fetch_folder, load_base
from hf_geglu.provenance import Provenance, TrainingRecord, remember, remember_fits
from hf_geglu.surgery import Fits, forget_original

DELTA = f"{FOLDER}/delta.safetensors"
ADAPTER = "adapter"
"""Folder of a PEFT adapter within a delta."""


def save_delta(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    training: TrainingRecord | None = None,
    command: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Save what a variant has learned as plan + delta: all of it or nothing.

    Args:
        model: a variant that was converted in this process or loaded with its manifest, or one with PEFT adapters on it
            (their adapter is saved as PEFT saves it).
        folder: where to. Must not exist, or be empty, unless `overwrite`.
        base: Hub id or folder of the base; by default the one that the model's provenance names.
        tokenizer: goes along.
        training: see `save_folder`.
        command: see `save_folder`.
        overwrite: replace what is there.

    Returns:
        The folder.

    Raises:
        ManifestError: the model has no plan, or the base is another one than it was made from.
        OutputError: the folder must not be written.
    """
    adapted = hasattr(model, "peft_config")
    if adapted and not hasattr(model, "get_base_model"):
        raise ManifestError(
            "this model carries adapters that were added with add_adapter; expected one from peft.get_peft_model. Wrap "
            "it with PEFT, or merge the adapters"
        )
    inner: Any = model.get_base_model() if adapted else model  # type: ignore[operator]
    provenance = known_provenance(inner)
    if provenance is None or provenance.plan is None:
        raise ManifestError(
            f"this {type(inner).__name__} has no plan that could be replayed; expected a variant that was converted in "
            "this process, or saved by save_folder. Use save_folder for the whole model"
        )
    if provenance.plan.narrows:
        raise ManifestError(
            f"this {type(inner).__name__} has fewer neurons than its base, so all its FFN weights are new and a delta "
            "would not be small; use save_folder"
        )
    where = base if base is not None else source_folder_of_base(inner, provenance)
    told = Manifest(model_class=type(inner).__name__, provenance=provenance)
    fits = known_fits(inner)
    step0 = _converted(told, where, fits=fits)
    tensors, places = _changed(dict(_plain_state(inner)), step0.state_dict())
    with whole_folder(folder, overwrite=overwrite) as temporary:
        (temporary / FOLDER).mkdir()
        save_file(tensors, temporary / DELTA, metadata={"places": json.dumps(places)})
        if adapted:
            _save_adapter(model, temporary / ADAPTER, provenance.base.id)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_papers(
            temporary,
            provenance.after(training),
            model=model,
            kind="delta",
            model_class=type(inner).__name__,
            command=command,
            name=Path(folder).resolve().name,
            base_folder=Path(where) if where is not None and os.path.isdir(where) else None,
            fits=fits,
        )
    return Path(folder)


def load_delta(
    auto_class: Any,
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    merge: bool = False,
    revision: str | None = None,
    token: str | None = None,
    **kwargs: Any,
) -> Any:
    """The full variant: load the base, convert it as the plan says, apply the delta.

    Args:
        auto_class: ``AutoModelForCausalLM`` or any other class with `from_pretrained`; None for the class that the
            delta was saved from.
        source: folder or Hub id of the delta.
        base: Hub id or folder of the base; by default the one that the manifest names.
        merge: merge a PEFT adapter into the weights; otherwise the model comes back as PEFT's.
        revision: of `source` on the Hub.
        token: for private repositories; the stored login by default.
        **kwargs: for ``from_pretrained`` of the base (`attn_implementation`, `cache_dir`...), except `dtype`: a delta
            belongs to the dtype it was made in; cast the model afterwards.

    Raises:
        ManifestError: no delta, or one that cannot be read.
        WeightsError: the base lacks tensors.
        HfGegluError: the base is another one than the delta belongs to, or cannot be converted.
    """
    folder = fetch_folder(source, revision=revision, token=token)
    manifest = read_manifest(folder)
    if manifest.kind != "delta" or manifest.provenance.plan is None:
        raise ManifestError(
            f"{folder.name} is no delta but a whole model; load it with {getattr(auto_class, '__name__', 'AutoModel')}"
            f".from_pretrained({folder.name!r})"
        )
    if "dtype" in kwargs or "torch_dtype" in kwargs:
        raise ManifestError(
            f"a delta belongs to the dtype it was made in, {manifest.provenance.plan.dtype}; load it without dtype and "
            "cast the model afterwards"
        )
    fits = read_fits(folder, manifest.provenance.plan)
    model = _converted(manifest, base, fits=fits, auto_class=auto_class, token=token, **kwargs)
    _apply(model, folder / DELTA)
    remember(model, manifest.provenance)
    if fits:
        remember_fits(model, fits)
    if not (folder / ADAPTER).is_dir():
        return _checked(model, manifest)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ManifestError("this delta holds a PEFT adapter; install peft to load it: pip install peft") from error
    _checked(model, manifest)
    wrapped = PeftModel.from_pretrained(model, str(folder / ADAPTER))
    return wrapped.merge_and_unload() if merge else wrapped


def source_folder_of_base(model: nn.Module, provenance: Provenance) -> Path | None:
    """The local folder of the base: where a model that was converted in this process was loaded from."""
    folder = source_folder(model)
    return folder if folder is not None and folder.resolve().name == provenance.base.name else None


def _converted(
    manifest: Manifest, base: str | os.PathLike[str] | None, *, fits: Fits | None = None, **kwargs: Any
) -> Any:
    """The base, checked and converted: the variant at step 0."""
    model = load_base(manifest, base, **kwargs)
    difference = check_base(model, manifest)
    if difference:
        raise ManifestError(
            f"this is not the base that the variant was made from ({manifest.provenance.base.name}): {difference}. "
            "Give the right one with base= (--base)"
        )
    plan = manifest.provenance.plan
    assert plan is not None
    convert(model, plan, fits=fits, verify="sites")
    forget_original(model)
    step0 = manifest.provenance.step0
    difference = "" if step0 is None else step0.difference(fingerprint(model), bitwise=True)
    if difference:
        raise ManifestError(
            f"converting the base again gave something else than the first time: {difference}. Install the versions "
            f"that the manifest names: {dict(manifest.versions)}"
        )
    return model


def _changed(
    state: Mapping[str, torch.Tensor], step0: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, list[list[int]]]]:
    """The parts of tensors that differ, and where they belong: [start, stop] for each dimension."""
    if state.keys() != step0.keys():
        odd = sorted(state.keys() ^ step0.keys())
        raise ManifestError(
            f"{len(odd)} tensors are in only one of the variant and its replayed conversion, {odd[0]!r} first; a delta "
            "keeps the architecture. Use save_folder for the whole model"
        )
    tensors: dict[str, torch.Tensor] = {}
    places: dict[str, list[list[int]]] = {}
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        before = step0[name].to(tensor.device)
        if tensor.shape != before.shape or tensor.dtype != before.dtype:
            raise ManifestError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} and was {tuple(before.shape)} {before.dtype} at step "
                "0; a delta keeps shapes and dtypes. Use save_folder for the whole model"
            )
        bits_equal = _same_bits(tensor, before)
        if bool(bits_equal.all()):
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key in seen:  # tied: applied once
            continue
        seen[key] = name
        place = _bounds(~bits_equal)
        places[name] = place
        tensors[name] = tensor.detach()[tuple(slice(start, stop) for start, stop in place)].cpu().clone().contiguous()
    return tensors, places


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Element by element; -0.0 is not 0.0, and NaN is NaN."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size())
    if integers is None or a.dim() == 0:
        return a == b
    return a.detach().contiguous().view(integers) == b.detach().contiguous().view(integers)


def _bounds(changed: torch.Tensor) -> list[list[int]]:
    """The smallest box around what changed."""
    box = []
    for axis in range(changed.dim()):
        others = tuple(each for each in range(changed.dim()) if each != axis)
        hit = (changed.any(dim=others) if others else changed).nonzero().flatten()
        box.append([int(hit[0]), int(hit[-1]) + 1])
    return box


def _plain_state(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """The state without PEFT's adapters, by the names that it has without them."""
    parts = ("base_layer", "original_module")
    wrapped = [name for name, module in model.named_modules() if not module._modules.keys().isdisjoint(parts)]
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner = next((each for each in wrapped if name.startswith(f"{each}.")), None)
        if owner is None:
            state[name] = tensor
            continue
        part, _, rest = name[len(owner) + 1 :].partition(".")
        if part in parts:
            state[f"{owner}.{rest}"] = tensor
    return state


def _save_adapter(model: Any, folder: Path, base: str | None) -> None:
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    for path in folder.rglob("adapter_config.json"):  # it names the base by the place where it lies on this machine
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "base_model_name_or_path": base}, indent=2) + "\n", encoding="utf-8")


def _apply(model: nn.Module, path: Path) -> None:
    state = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            places = json.loads((file.metadata() or {})["places"])
            missing = sorted(places.keys() - state.keys())
            if missing:
                raise ManifestError(
                    f"the delta has {missing[0]!r}, which {type(model).__name__} has not; load it with the class that "
                    "it was saved from"
                )
            for name, place in places.items():
                part = state[name].detach()[tuple(slice(start, stop) for start, stop in place)]
                value = file.get_tensor(name)
                if part.shape != value.shape:
                    raise ManifestError(f"the delta's {name} does not fit {type(model).__name__}; download it again")
                part.copy_(value)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, HfGegluError):
            raise
        raise ManifestError(f"{DELTA} cannot be read ({error}); download it again") from error


def _checked(model: Any, manifest: Manifest) -> Any:
    expected: Fingerprint | None = manifest.weights
    difference = "" if expected is None else expected.difference(fingerprint(model), bitwise=True)
    if difference:
        raise ManifestError(f"base and delta together are not what was saved: {difference}; download both again")
    return model
