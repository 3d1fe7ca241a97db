"""from_pretrained: a dense or otherwise gated repository in, a GeGLU model out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hf_geglu.converting import Verify, convert
from hf_geglu.errors import WeightsError
from hf_geglu.hub.integrity import check_weights
from hf_geglu.inputs import Inputs
from hf_geglu.plan import GeluForm, Plan, make_plan
from hf_geglu.selection import Layers


def from_pretrained(
    auto_class: Any,
    model: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    variant: str = "geglu",
    layers: Layers = None,
    gelu: GeluForm = "owner",
    inputs: Inputs | None = None,
    verify: Verify = "model",
    **kwargs: Any,
) -> Any:
    """Load a model and convert it.

    A repository or folder that holds a variant already is loaded as it is.

    Args:
        auto_class: ``AutoModelForCausalLM`` or any other class with `from_pretrained`.
        model: a Hub id or a folder.
        plan: see `hf_geglu.convert`, as for `variant`, `layers`, `gelu`, `inputs` and `verify`.
        variant: see there.
        layers: see there.
        gelu: see there.
        inputs: see there.
        verify: see there.
        **kwargs: for ``auto_class.from_pretrained`` (`dtype`, `revision`, `device_map`, `token`...).

    Returns:
        The converted model, in eval mode as transformers loads it.

    Raises:
        WeightsError: a shard is missing or truncated, or the checkpoint lacks weights of an FFN block.
        HfGegluError: see `hf_geglu.convert`.
    """
    loaded = load(auto_class, model, **kwargs)
    if not hasattr(loaded.config, "geglu"):
        if plan is None:
            plan = make_plan(loaded, variant, layers=layers, gelu=gelu)
        convert(loaded, plan, inputs=inputs, verify=verify)
    return loaded


def load(auto_class: Any, model: str | os.PathLike[str], **kwargs: Any) -> Any:
    """``auto_class.from_pretrained``, with a folder's weights checked first and missing weights never silently made up.

    New heads are allowed: a classification head that the checkpoint lacks is what fine-tuning is for.

    Raises:
        WeightsError: see `from_pretrained`.
    """
    if os.path.isdir(model):
        check_weights(Path(model))
    loaded, info = auto_class.from_pretrained(model, output_loading_info=True, **kwargs)
    prefix = loaded.base_model_prefix
    missing = sorted(
        name for name in info["missing_keys"] if loaded.base_model is loaded or name.startswith(f"{prefix}.")
    )
    # poolers are the one part of base models that checkpoints leave out by custom
    missing = [name for name in missing if "pooler" not in name]
    if missing:
        raise WeightsError(
            f"the checkpoint lacks {len(missing)} tensors of {type(loaded).__name__}, for example {missing[0]!r}, and "
            "transformers would make them up; check that it is complete and that the class fits it"
        )
    return loaded
