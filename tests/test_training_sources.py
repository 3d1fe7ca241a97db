"""Mixtures, duplicates, limits and the cache: what is trained on, and that it is said."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny_tasks import sentence
from tiny_training import causal_tokenizer, one_thread  # noqa: F401

pytest.importorskip("datasets")

import torch

from hf_geglu.errors import ConfigurationError, DataError
from hf_geglu.training import DataSettings
from hf_geglu.training.data import tokenised as cache
from hf_geglu.training.data.batches import draws
from hf_geglu.training.data.corpus import Corpus, load_corpus
from hf_geglu.training.data.mixture import Ingredient

pytestmark = pytest.mark.usefixtures("place")


def write(name: str, texts: list[str]) -> None:
    Path(name).write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))


def load(seed: int = 0, **data: Any) -> Corpus:
    given = {"validation_split_percentage": 0, "packing": False, **data}
    return load_corpus(DataSettings(**given), causal_tokenizer(), task="clm", block_size=32, seed=seed)


def first_words(corpus: Corpus, count: int | None = None) -> list[str]:
    tokenizer = causal_tokenizer()
    blocks = corpus.train if count is None else islice(iter(corpus.train), count)
    return [tokenizer.decode(block["input_ids"]).split()[0] for block in blocks]


def test_a_mixture_has_the_shares_that_were_asked_for() -> None:
    write("a.jsonl", ["fox " * (1 + i % 9) for i in range(400)])
    write("b.jsonl", ["gate " * (1 + i % 9) for i in range(400)])
    mixed = load(dataset_mixture=["a.jsonl=3", "b.jsonl=1"])
    words = first_words(mixed)
    assert set(words) == {"fox", "gate"}
    # it ends when the first source does, and no row is twice
    assert words.count("fox") in (399, 400)
    assert words.count("gate") == pytest.approx(400 / 3, rel=0.25)
    told = next(line for line in mixed.lines if line.startswith("mixture"))
    assert f"{words.count('fox')} of 400 rows of a.jsonl" in told
    assert f"{words.count('gate')} of 400 rows of b.jsonl" in told
    assert words == first_words(load(dataset_mixture=["a.jsonl=3", "b.jsonl=1"]))
    assert words != first_words(load(seed=1, dataset_mixture=["a.jsonl=3", "b.jsonl=1"]))
    repeated = load(dataset_mixture=["a.jsonl=3", "b.jsonl=1"], mixture_stop="all_exhausted")
    assert first_words(repeated).count("gate") >= 400
    assert any("repeated" in line for line in repeated.lines)


def test_a_stream_of_a_mixture_goes_on_where_it_was() -> None:
    write("a.jsonl", [f"fox {sentence(i)}" for i in range(40)])
    write("b.jsonl", [f"gate {sentence(i)}" for i in range(40)])
    how: dict[str, Any] = {"dataset_mixture": ["a.jsonl=1", "b.jsonl=1"], "streaming": True}
    stream = load(**how).train
    whole = [block["input_ids"] for _, block in islice(draws(stream, seed=0), 150)]
    again = [block["input_ids"] for _, block in islice(draws(load(**how).train, seed=0, start=90), 60)]
    assert whole[90:] == again
    assert first_words(load(**how), 30) != ["fox"] * 30


def test_a_stream_of_whole_documents_goes_on_where_it_was() -> None:
    write("a.jsonl", [sentence(i) for i in range(60)])
    how: dict[str, Any] = {"train_file": ["a.jsonl"], "streaming": True, "packing": True}
    whole = [block["input_ids"] for _, block in islice(draws(load(**how).train, seed=0), 70)]
    again = [block["input_ids"] for _, block in islice(draws(load(**how).train, seed=0, start=33), 37)]
    assert all(torch.equal(a, b) for a, b in zip(whole[33:], again, strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wiki=0.5", Ingredient("wiki", 0.5)),
        ("me/wiki:en@v1=2", Ingredient("me/wiki", 2.0, "en", "v1")),
        ("me/wiki@abc=1e-1", Ingredient("me/wiki", 0.1, None, "abc")),
    ],
)
def test_sources_of_a_mixture(text: str, expected: Ingredient) -> None:
    assert Ingredient.parse(text) == expected


@pytest.mark.parametrize(
    ("mixture", "error", "message"),
    [
        (["a.jsonl", "b.jsonl"], ConfigurationError, "expected SOURCE=WEIGHT"),
        (["a.jsonl=0", "b.jsonl=1"], ConfigurationError, "weight above 0"),
        (["a.jsonl=1"], ConfigurationError, "of one source"),
        (["a.jsonl=1", "c.jsonl=1"], DataError, r"c\.jsonl does not exist"),
        (["a.jsonl=1", "t.txt=1"], DataError, r"t\.txt is a running text.*--text_unit"),
    ],
)
def test_mixtures_that_cannot_be(mixture: list[str], error: Any, message: str) -> None:
    write("a.jsonl", ["fox"] * 3)
    write("b.jsonl", ["gate"] * 3)
    Path("t.txt").write_text("the fox\n")
    with pytest.raises(error, match=message):
        load(dataset_mixture=mixture)


def test_validation_rows_that_were_trained_on_are_dropped() -> None:
    write("a.jsonl", [f"fox {sentence(i)}" for i in range(30)])
    write("v.jsonl", [*(f"fox {sentence(i)}" for i in range(5)), "gate one", "gate two"])
    apart = load(train_file=["a.jsonl"], validation_file=["v.jsonl"])
    assert apart.validation is not None
    assert len(apart.validation) == 2
    assert "validation: 5 of 7 rows occur in the training data, dropped" in apart.lines
    both = load(train_file=["a.jsonl"], validation_file=["v.jsonl"], dedup_validation=False)
    assert both.validation is not None
    assert len(both.validation) == 7
    write("v.jsonl", [f"fox {sentence(i)}" for i in range(5)])
    with pytest.raises(DataError, match=r"all 5 validation rows occur.*--dedup_validation false"):
        load(train_file=["a.jsonl"], validation_file=["v.jsonl"])


def test_a_stream_leaves_out_what_is_held_out() -> None:
    texts = [f"{'fox ' * (i % 6 + 1)}gate" for i in range(60)]
    write("a.jsonl", texts)
    corpus = load(train_file=["a.jsonl"], streaming=True, validation_split_percentage=5, max_eval_samples=3)
    lengths = {len(block["input_ids"]) for block in corpus.train}
    assert lengths == {6, 7, 8}  # those of 3, 4 and 5 tokens, end included, are held out
    assert any("left out of the stream" in line for line in corpus.lines)


def test_limits_come_after_mixing() -> None:
    write("a.jsonl", [f"fox {sentence(i)}" for i in range(30)])
    write("b.jsonl", [f"gate {sentence(i)}" for i in range(30)])
    corpus = load(dataset_mixture=["a.jsonl=1", "b.jsonl=1"], max_train_samples=10)
    assert len(corpus.train) == 10  # type: ignore[arg-type]


def test_tokens_are_made_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", [sentence(i) for i in range(30)])
    made: list[int] = []
    real = cache._write
    monkeypatch.setattr(cache, "_write", lambda *args: (made.append(1), real(*args)))
    one = load(train_file=["a.jsonl"])
    two = load(train_file=["a.jsonl"])
    assert len(made) == 1
    assert one.train.sha256() == two.train.sha256()  # type: ignore[union-attr]
    assert one.lines == two.lines
    load(train_file=["a.jsonl"], use_cache=False)
    assert len(made) == 1
    for file in (place.parent / "cache" / "hf_geglu").iterdir():
        file.write_bytes(b"damaged")
    three = load(train_file=["a.jsonl"])
    assert len(made) == 2
    assert one.train.sha256() == three.train.sha256()  # type: ignore[union-attr]
    write("a.jsonl", [sentence(i) for i in range(31)])
    assert len(load(train_file=["a.jsonl"]).train) == 31  # type: ignore[arg-type]


def test_whole_documents_side_by_side_lose_nothing() -> None:
    texts = [sentence(i) for i in range(40)] + ["fox " * 80]
    write("a.jsonl", texts)
    corpus = load(train_file=["a.jsonl"], packing=True)
    tokens = sum(len(block["input_ids"]) for block in corpus.train)
    assert tokens == sum(len(text.split()) + 1 for text in texts)
    line = corpus.lines[0]
    assert "41 documents" in line
    assert "1 documents longer than a block cut into pieces, none dropped" in line
    assert "% full" in line
    assert corpus.side_by_side
