"""Config, tokenizer or image processor, and model of a run, and whether they go together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_geglu.errors import ConfigurationError, DataError, HfGegluError
from hf_geglu.hub import load
from hf_geglu.modes import evaluating
from hf_geglu.training.data.corpus import Corpus
from hf_geglu.training.objectives.head import logits_in
from hf_geglu.training.settings.run import ModelSettings
from hf_geglu.training.tasks import TaskKind

DEFAULT_BLOCK_SIZE = 1024

logger = logging.getLogger(__name__)


def load_config(settings: ModelSettings) -> Any:
    """The model's config.

    Raises:
        ConfigurationError: there is none.
    """
    from transformers import AutoConfig

    import hf_geglu  # noqa: F401 - makes the Auto classes know the variants

    with _readable(settings.model_name_or_path):
        return AutoConfig.from_pretrained(settings.model_name_or_path, **_source(settings))


def load_processor(settings: ModelSettings, kind: TaskKind) -> Any:
    """Tokenizer or image processor.

    Raises:
        ConfigurationError: there is none, or the task needs a padding token and it has none.
    """
    name = settings.tokenizer_name or settings.model_name_or_path
    source = {"trust_remote_code": settings.trust_remote_code} if settings.tokenizer_name else _source(settings)
    if kind.reads == "pictures":
        from transformers import AutoImageProcessor

        with _readable(name, "a model with an image processor; name another with --tokenizer_name"):
            return AutoImageProcessor.from_pretrained(name, **source)
    from transformers import AutoTokenizer

    with _readable(name, "a tokenizer; name another with --tokenizer_name"):
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    if settings.pad_token is not None:
        if settings.pad_token not in tokenizer.get_vocab():
            raise ConfigurationError(
                f"--pad_token {settings.pad_token!r} is no token of {Path(name).name}: expected one of its vocabulary, "
                f"such as {tokenizer.eos_token or tokenizer.unk_token!r}. Name one."
            )
        tokenizer.pad_token = settings.pad_token
    if kind.needs_pad and tokenizer.pad_token_id is None:
        raise ConfigurationError(
            f"{type(tokenizer).__name__} has no padding token: expected one, since rows of a batch are filled up with "
            f"it. Say --pad_token, such as --pad_token {tokenizer.eos_token or '[PAD]'!r}."
        )
    return tokenizer


def load_model(
    settings: ModelSettings, kind: TaskKind, dtype: str, *, options: Mapping[str, Any], seed: int
) -> nn.Module:
    """The model with the head that the task needs.

    A head that the checkpoint lacks is drawn from the seed, the same one each time: a control starts where the variant
    does.

    Raises:
        ConfigurationError: no such model, or none that the task can train.
    """
    import transformers

    more = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
    torch.manual_seed(seed)
    with _readable(settings.model_name_or_path, kind.expected):
        model: nn.Module = load(
            getattr(transformers, kind.auto_class),
            settings.model_name_or_path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            # a head for other classes than these is replaced
            **({"ignore_mismatched_sizes": True} if options else {}),
            **options,
            **_source(settings),
            **more,
        )
    return model


def set_padding(model: nn.Module, processor: Any) -> None:
    """Tell the model which token fills rows up, if it does not know: some find the end of a text by it."""
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None and getattr(processor, "pad_token_id", None) is not None:
        config.pad_token_id = processor.pad_token_id


def choose_block_size(
    wanted: int | None,
    config: Any,
    tokenizer: Any,
    *,
    default: int = DEFAULT_BLOCK_SIZE,
    flag: str = "--block_size",
) -> int:
    """Length of a block: what was wanted, or the default as far as model and tokenizer go, in tokens.

    Raises:
        ConfigurationError: more than the model has positions for.
    """
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text_config, "max_position_embeddings", None) or 0  # some models write -1 for no limit
    if wanted is None:
        sizes = [default, limit, int(tokenizer.model_max_length)]
        return min(size for size in sizes if size > 0)
    if 0 < limit < wanted:
        raise ConfigurationError(
            f"{flag} {wanted}: expected at most {limit}, the positions that the model has. Lower it."
        )
    return wanted


def check_causal(model: nn.Module) -> None:
    """Refuse a model whose prediction of a token has seen it: an encoder with the head of a decoder learns to copy.

    Raises:
        ConfigurationError: tokens change what was predicted before them.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device)[None]
    other = torch.cat([ids[:, :4], ids[:, 4:].flip(1)], dim=1)
    try:
        with torch.no_grad(), evaluating(model):
            one, two = (logits_in(model(input_ids=each))[:, :4].float() for each in (ids, other))
    except Exception as error:  # a model that takes no plain text; what it lacks will be said when it is trained
        logger.debug("%s cannot be tried on a few tokens: %s", type(model).__name__, error)
        return
    bound = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.05  # experts round by who is beside a token
    if float((one - two).abs().max()) > bound * float(one.abs().max()):
        raise ConfigurationError(
            f"{type(model).__name__} sees the tokens that it is to predict: later ones change its predictions of "
            "earlier ones. Expected a causal model. For an encoder use the recipe mlm."
        )


def check_positions(model: nn.Module, block_size: int) -> None:
    """Refuse blocks longer than a table of positions that begins behind its padding, as RoBERTa's does.

    Raises:
        ConfigurationError: they are.
    """
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.num_embeddings == limit:
            room = limit - (0 if module.padding_idx is None else module.padding_idx + 1)
            if block_size > room:
                raise ConfigurationError(
                    f"--block_size {block_size}: expected at most {room}, the positions that the model has. Lower it."
                )


def check_vocabulary(model: nn.Module, corpus: Corpus) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        DataError: there are some.
    """
    embeddings: Any = model
    rows = int(embeddings.get_input_embeddings().weight.shape[0])
    for blocks in (corpus.train, corpus.validation):
        largest: Any = getattr(blocks, "largest_token", None)
        if largest is not None and largest() >= rows:
            raise DataError(
                f"the tokenizer gives token {largest()}, the model has embeddings for {rows}: expected a tokenizer "
                "that belongs to the model. Give --tokenizer_name, or resize the embeddings first."
            )


def _source(settings: ModelSettings) -> dict[str, Any]:
    return {"revision": settings.model_revision or "main", "trust_remote_code": settings.trust_remote_code}


@contextmanager
def _readable(name: str, expected: str = "a model") -> Iterator[None]:
    """Turn what Transformers raises about a model that it cannot find or take into one of our errors."""
    try:
        yield
    except HfGegluError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigurationError(
            f"{name if not Path(name).is_absolute() else Path(name).name} cannot be loaded: {reason} Expected "
            f"{expected} on the Hub or in a local folder. Check --model_name_or_path."
        ) from error
