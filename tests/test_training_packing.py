"""Packing loses nothing that it does not count."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import causal_tokenizer, lines, masked_tokenizer
from tokenizers import processors

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training import TokenBlocks, blocks_from_texts
from hf_geglu.training.data.packing import Packing, Tally, pack, packing_for, tokenise

documents = st.lists(st.lists(st.integers(10, 99), max_size=12), max_size=12)
around = st.lists(st.integers(1, 9), max_size=2).map(tuple)


@given(documents, st.integers(5, 12), around, around, around, around, st.booleans())
def test_packed_blocks_are_the_documents_end_to_end(
    texts: list[list[int]],
    size: int,
    before: tuple[int, ...],
    after: tuple[int, ...],
    head: tuple[int, ...],
    tail: tuple[int, ...],
    keep: bool,
) -> None:
    packing = Packing(size, before=before, after=after, head=head, tail=tail)
    tally = Tally()
    blocks = list(pack(texts, packing, tally, keep_tail=keep))
    stream = list(chain.from_iterable([*before, *text, *after] for text in texts if text))
    inner = [block[len(head) : len(block) - len(tail)] for block in blocks]
    assert all(block[: len(head)] == list(head) and block[len(block) - len(tail) :] == list(tail) for block in blocks)
    got = list(chain.from_iterable(inner))
    assert got == stream[: len(got)]
    assert len(stream) - len(got) == (0 if keep else tally.tail_tokens)
    assert all(len(block) == size for block in (blocks[:-1] if keep else blocks))
    assert (tally.documents, tally.empty) == (len(texts), sum(not text for text in texts))
    assert (tally.tokens, tally.blocks) == (len(stream), len(blocks))


@given(documents, st.integers(4, 12))
def test_one_block_each_counts_what_it_cuts(texts: list[list[int]], size: int) -> None:
    tally = Tally()
    blocks = list(pack(texts, Packing(size, head=(1,), tail=(2,), one_each=True), tally))
    full = [text for text in texts if text]
    assert [block[1:-1] for block in blocks] == [text[: size - 2] for text in full]
    assert tally.truncated_tokens == sum(max(0, len(text) - size + 2) for text in full)
    assert tally.truncated_documents == sum(len(text) > size - 2 for text in full)


def test_the_line_for_people_says_what_was_dropped() -> None:
    tally = Tally()
    list(pack([[1, 2, 3], [], [4, 5]], Packing(2), tally))
    assert tally.line("training") == (
        "training: 3 documents, 5 tokens, 2 blocks; 1 empty documents skipped; "
        "1 tokens at the end that fill no block dropped"
    )


def test_causal_documents_end_with_eos() -> None:
    assert packing_for("clm", causal_tokenizer(), block_size=8) == Packing(8, after=(1,))
    assert packing_for("clm", causal_tokenizer(), block_size=8, joined=True) == Packing(8)


def test_a_tokenizer_that_starts_documents_does_so_when_packed() -> None:
    tokenizer = causal_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    assert packing_for("clm", tokenizer, block_size=8) == Packing(8, before=(1,), after=(1,))
    # a running text has one beginning; the model wants its token at the start of what it sees
    assert packing_for("clm", tokenizer, block_size=8, joined=True) == Packing(8, head=(1,))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])


def test_masked_blocks_stand_between_cls_and_sep() -> None:
    assert packing_for("mlm", masked_tokenizer(), block_size=8) == Packing(8, after=(3,), head=(2,), tail=(3,))
    each = packing_for("mlm", masked_tokenizer(), block_size=8, one_each=True)
    assert each == Packing(8, head=(2,), tail=(3,), one_each=True)
    with pytest.raises(ConfigurationError, match="room for text"):
        packing_for("mlm", masked_tokenizer(), block_size=2)


def test_blank_texts_give_no_tokens() -> None:
    tokenizer = causal_tokenizer()
    assert list(tokenise(["the fox", "", "  \n", None], tokenizer))[1:] == [[], [], []]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9])
def test_no_text_is_lost_between_batches(count: int) -> None:
    assert len(list(tokenise(lines(count), causal_tokenizer(), batch=4))) == count


def test_blocks_in_memory() -> None:
    blocks = TokenBlocks.of([[1, 2, 3], [4]])
    assert len(blocks) == 2
    assert blocks[0]["input_ids"].tolist() == [1, 2, 3]
    assert blocks[-1]["input_ids"].tolist() == [4]
    with pytest.raises(IndexError):
        blocks[2]
    assert [block["input_ids"].tolist() for block in blocks] == [[1, 2, 3], [4]]
    assert len(TokenBlocks.of([])) == 0


def test_texts_to_blocks() -> None:
    blocks, tally = blocks_from_texts(lines(10), causal_tokenizer(), block_size=16)
    assert tally.documents == 10
    assert {len(block["input_ids"]) for block in blocks} == {16}


def test_less_than_one_block() -> None:
    with pytest.raises(DataError, match=r"expected at least 64, one block.*--block_size"):
        blocks_from_texts(lines(2), causal_tokenizer(), block_size=64)
