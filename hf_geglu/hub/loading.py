"""from_pretrained: a dense or otherwise gated repository in, a GeGLU model out."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_geglu.converting import Verify, convert
from hf_geglu.errors import WeightsError
from hf_geglu.files import check_weights
from hf_geglu.inputs import Inputs
from hf_geglu.plan import GeluForm, Plan
from hf_geglu.planning import make_plan
from hf_geglu.provenance import cached_commit
from hf_geglu.selection import Layers
from hf_geglu.sites import GivenSite, find_sites

logger = logging.getLogger(__name__)


def from_pretrained(
    auto_class: Any,
    model: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    variant: str = "geglu",
    layers: Layers = None,
    gelu: GeluForm = "owner",
    sites: Sequence[GivenSite] | None = None,
    inputs: Inputs | None = None,
    verify: Verify = "model",
    output_report: bool = False,
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
        sites: see there.
        inputs: see there.
        verify: see there.
        output_report: return (model, report), as `output_loading_info` does in transformers.
        **kwargs: for ``auto_class.from_pretrained`` (`dtype`, `revision`, `device_map`, `token`...).

    Returns:
        The converted model, in eval mode as transformers loads it; with `output_report` also the report of the
        conversion, None for a variant that was loaded as it is.

    Raises:
        WeightsError: a shard is missing or truncated, or the checkpoint lacks weights of an FFN block.
        HfGegluError: see `hf_geglu.convert`.
    """
    loaded = load(auto_class, model, **kwargs)
    report = None
    if not hasattr(loaded.config, "geglu"):
        if plan is None:
            found = find_sites(loaded, sites=sites)
            plan = make_plan(loaded, variant, layers=layers, gelu=gelu, found=found)
        report = convert(loaded, plan, inputs=inputs, verify=verify)
    return (loaded, report) if output_report else loaded


def load(auto_class: Any, model: str | os.PathLike[str], **kwargs: Any) -> Any:
    """``auto_class.from_pretrained``, with a folder's weights checked first and missing weights never silently made up.

    New heads are allowed: a classification head that the checkpoint lacks is what fine-tuning is for.

    Raises:
        WeightsError: see `from_pretrained`.
    """
    local = os.path.isdir(model)
    if local:
        check_weights(Path(model))
    loaded, info = auto_class.from_pretrained(model, output_loading_info=True, **kwargs)
    if not local and getattr(loaded.config, "_commit_hash", None) is None:  # transformers 5 keeps it to itself
        loaded.config._commit_hash = cached_commit(str(model), kwargs.get("revision"), kwargs.get("cache_dir"))
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


def load_processor(model: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The tokenizer, image processor or feature extractor that belongs to a model; None where it has none.

    Args:
        model: a Hub id or a folder.
        **kwargs: for `from_pretrained` (`revision`, `trust_remote_code`...).
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(model, **kwargs)
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer or processor goes along, %s has none that loads: %s", Path(model).name, error)
        return None
