"""Models of a few thousand parameters, tokenizers and text to train them on; nothing is downloaded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a gated block multiplies a gate by a value",
    "the value branch is open from the first step",
    "nothing is lost and nothing is dropped in silence",
    "one two three four five six seven eight nine ten",
]
VOCABULARY = 96
SPECIAL = ["<unk>", "<eos>", "[CLS]", "[SEP]", "[MASK]", "[PAD]"]


@functools.cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return tokenizer


def causal_tokenizer() -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(), unk_token="<unk>", eos_token="<eos>", bos_token="<eos>", model_max_length=64
    )


def masked_tokenizer() -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(),
        unk_token="<unk>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        pad_token="[PAD]",
        model_max_length=64,
    )


def gpt2(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def random_blocks(count: int, *, length: int = 16, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(6, VOCABULARY, (length,), generator=generator)} for _ in range(count)]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def saved_model(folder: Path, kind: str) -> Path:
    """A model with its tokenizer on disk."""
    model, tokenizer = (gpt2(), causal_tokenizer()) if kind == "clm" else (bert(), masked_tokenizer())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines(count: int) -> list[str]:
    return [SENTENCES[i % len(SENTENCES)] for i in range(count)]


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every path below a folder and its content, to see that nothing has changed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def interrupted(run: Callable[[], Any], *, after: int) -> None:
    """Run until a step has been logged, then stop as Ctrl-C would."""
    from hf_geglu.training.reports.log import RunLog

    real = RunLog.step

    def step(self: Any, record: Any) -> None:
        real(self, record)
        if record.step == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it: with models this small threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
