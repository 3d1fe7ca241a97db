"""Labels stand beside the logits that predict them; masks depend on seed and position only."""

from __future__ import annotations

import pytest
import torch
from tiny_training import causal_tokenizer, masked_tokenizer

from hf_geglu.errors import ConfigurationError
from hf_geglu.training import CausalLM, MaskedLM, objective_for
from hf_geglu.training.objectives.objective import IGNORED

MLM = MaskedLM(mask_token_id=4, vocab_size=96, special_ids=frozenset(range(6)), probability=0.15, pad_token_id=5)


def test_a_causal_batch_of_unequal_blocks() -> None:
    batch = CausalLM(pad_token_id=9).batch([[1, 2, 3], [4, 5]])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[2, 3, IGNORED], [5, IGNORED, IGNORED]]


def test_a_causal_example_may_bring_labels_and_padding() -> None:
    padded = {"input_ids": [1, 2, 0, 0], "attention_mask": [1, 1, 0, 0]}
    answers_only = {"input_ids": [1, 2, 3, 4], "labels": [IGNORED, IGNORED, 3, 4]}
    batch = CausalLM().batch([padded, answers_only])
    assert batch["labels"].tolist() == [[2, IGNORED, IGNORED, IGNORED], [IGNORED, 3, 4, IGNORED]]


def test_masks_depend_on_seed_and_position_only() -> None:
    block = list(range(6, 70))
    alone = MLM.batch([block], positions=[17], seed=1)
    among = MLM.batch([block, block], positions=[3, 17], seed=1)
    assert torch.equal(alone["input_ids"][0], among["input_ids"][1])
    assert torch.equal(alone["labels"][0], among["labels"][1])
    assert not torch.equal(among["labels"][0], among["labels"][1])
    assert not torch.equal(alone["labels"], MLM.batch([block], positions=[17], seed=2)["labels"])


def test_shares_of_the_masked_tokens() -> None:
    ids = torch.full((400_000,), 50)
    batch = MLM.batch([ids], positions=[0], seed=0)
    hidden = batch["labels"][0] != IGNORED
    assert torch.equal(batch["labels"][0][hidden], ids[hidden])
    assert float(hidden.float().mean()) == pytest.approx(0.15, abs=0.005)
    seen = batch["input_ids"][0][hidden]
    assert float((seen == 4).float().mean()) == pytest.approx(0.8 + 0.1 / 96, abs=0.01)
    assert float((seen == 50).float().mean()) == pytest.approx(0.1 + 0.1 / 96, abs=0.01)
    assert torch.equal(batch["input_ids"][0][~hidden], ids[~hidden])


def test_special_tokens_and_padding_are_never_hidden() -> None:
    block = {"input_ids": [2, 10, 11, 3, 5, 5], "attention_mask": [1, 1, 1, 1, 0, 0]}
    for position in range(50):
        labels = MLM.batch([block], positions=[position], seed=0)["labels"][0]
        assert (labels[[0, 3, 4, 5]] == IGNORED).all()
        assert (labels != IGNORED).sum() >= 1


def test_a_block_of_special_tokens_predicts_nothing() -> None:
    assert (MLM.batch([[2, 3]], positions=[0], seed=0)["labels"] == IGNORED).all()


def test_objectives_of_tokenizers() -> None:
    assert objective_for("clm", causal_tokenizer()) == CausalLM(pad_token_id=0)
    masked = objective_for("mlm", masked_tokenizer(), mlm_probability=0.3)
    assert isinstance(masked, MaskedLM)
    assert (masked.mask_token_id, masked.pad_token_id, masked.probability) == (4, 5, 0.3)
    with pytest.raises(ConfigurationError, match="no mask token"):
        objective_for("mlm", causal_tokenizer())
