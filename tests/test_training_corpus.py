"""Text from every kind of source, and a clear word where there is none."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import SENTENCES, causal_tokenizer, lines, masked_tokenizer

pytest.importorskip("datasets")

import datasets
import huggingface_hub

from hf_geglu.errors import DataError
from hf_geglu.training import DataSettings, MapBlocks, TokenBlocks
from hf_geglu.training.data.corpus import Corpus, find_text_column, load_corpus

# datasets 4 leaves csv files to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file.*[ct]sv:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*[ct]sv:pytest.PytestUnraisableExceptionWarning"),
]

TEXT = lines(60)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def load(task: Any = "clm", *, block_size: int = 16, **data: Any) -> Corpus:
    """The lines repeat themselves, so duplicates stay; order matters, so documents are cut end to end."""
    data = {"packing_strategy": "wrapped", "dedup_validation": False, **data}
    tokenizer = causal_tokenizer() if task == "clm" else masked_tokenizer()
    return load_corpus(DataSettings(**data), tokenizer, task=task, block_size=block_size, seed=0)


def words(blocks: Any) -> list[str]:
    return causal_tokenizer().decode([int(i) for block in blocks for i in block["input_ids"]]).split()


def write(folder: Path, name: str, texts: list[str], *, column: str = "text") -> Path:
    """The same rows in the format that the name says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{column: text, "number": i} for i, text in enumerate(texts)]
    table = datasets.Dataset.from_list(rows)
    if name.endswith(".parquet"):
        table.to_parquet(str(path))
    elif name.endswith((".csv", ".tsv")):
        table.to_csv(str(path), index=False, sep="\t" if name.endswith(".tsv") else ",")
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".gz"):
        with gzip.open(path, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text("".join(text + "\n" for text in texts))
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_tables(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name, TEXT)
    corpus = load(train_file=[str(file)], validation_split_percentage=0)
    assert corpus.column == "text"
    expected = " <eos> ".join(TEXT).split()
    got = words(corpus.train)
    assert got == [*expected, "<eos>"][: len(got)]
    assert corpus.validation is None
    assert "60 documents" in corpus.lines[0]


def test_a_txt_file_is_one_running_text(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", [*TEXT[:30], "", *TEXT[30:]])
    corpus = load(train_file=[str(file)], validation_split_percentage=0)
    got = words(corpus.train)
    assert got == " ".join(TEXT).split()[: len(got)]
    assert "61 lines of running text" in corpus.lines[0]


@pytest.mark.parametrize(("unit", "documents"), [("line", 61), ("paragraph", 2)])
def test_a_txt_file_of_documents(tmp_path: Path, unit: str, documents: int) -> None:
    file = write(tmp_path, "a.txt", [*TEXT[:30], "", *TEXT[30:]])
    corpus = load(train_file=[str(file)], text_unit=unit, validation_split_percentage=0)
    assert f"{documents} documents" in corpus.lines[0]
    assert words(corpus.train).count("<eos>") >= documents - 2


def test_several_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path, "d/one.jsonl", TEXT[:20])
    write(tmp_path, "d/below/two.jsonl", TEXT[20:40])
    (tmp_path / "d/README.md").write_text("not a corpus")
    extra = write(tmp_path, "three.jsonl", TEXT[40:])
    corpus = load(train_file=[str(tmp_path / "d"), str(extra)], validation_split_percentage=0)
    assert "60 documents" in corpus.lines[0]


def test_a_local_folder_as_a_dataset(tmp_path: Path) -> None:
    write(tmp_path, "d/train.csv", TEXT)
    write(tmp_path, "d/validation.csv", TEXT[:5])
    corpus = load(dataset_name=str(tmp_path / "d"))
    assert ("60 documents" in corpus.lines[0], "5 documents" in corpus.lines[1]) == (True, True)
    write(tmp_path, "t/book.txt", TEXT)
    assert "57 lines of running text" in load(dataset_name=str(tmp_path / "t")).lines[0]


def test_a_dataset_that_was_saved_to_disk(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXT})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select(range(4))}).save_to_disk(str(tmp_path / "two"))
    assert "57 documents" in load(dataset_name=str(tmp_path / "one")).lines[0]
    both = load(dataset_name=str(tmp_path / "two"), dataset_test_split="test")
    assert ("60 documents" in both.lines[0], "4 documents" in both.lines[1]) == (True, True)
    with pytest.raises(DataError, match=r"no split dev: expected one of train, test"):
        load(dataset_name=str(tmp_path / "two"), dataset_test_split="dev")


def test_a_validation_file(tmp_path: Path) -> None:
    files = {"train_file": [str(write(tmp_path, "a.jsonl", TEXT))]}
    corpus = load(**files, validation_file=[str(write(tmp_path, "b.csv", TEXT[:3]))])
    assert "3 documents" in corpus.lines[1]
    with pytest.raises(DataError, match="the same kind"):
        load(**files, validation_file=[str(write(tmp_path, "c.txt", TEXT))])


def test_the_split_is_the_same_every_time_and_loses_no_row(tmp_path: Path) -> None:
    texts = [f"{SENTENCES[i % 5]} " * (i + 1) for i in range(40)]
    file = write(tmp_path, "a.jsonl", texts)
    one, two = (load(train_file=[str(file)], validation_split_percentage=10) for _ in range(2))
    assert isinstance(one.train, TokenBlocks)
    assert isinstance(two.train, TokenBlocks)
    assert one.train.tokens.tolist() == two.train.tokens.tolist()
    assert one.validation is not None
    assert ("36 documents" in one.lines[0], "4 documents" in one.lines[1]) == (True, True)
    every = sum(len(text.split()) + 1 for text in texts)
    dropped = every - len(one.train.tokens) - len(one.validation.tokens)
    assert 0 <= dropped < 16  # the tail of the training part; the validation set keeps its own


def test_the_end_of_a_running_text_is_held_out(tmp_path: Path) -> None:
    texts = [*TEXT[:-1], "the end is held out", "", "", ""]
    corpus = load(train_file=[str(write(tmp_path, "a.txt", texts))], validation_split_percentage=2)
    assert corpus.validation is not None
    assert words(corpus.validation) == [
        "the",
        "<unk>",
        "is",
        "<unk>",
        "<unk>",
    ]  # on past the blank lines, until there is text


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", [" ".join(TEXT)])
    with pytest.raises(DataError, match="1 row cannot be split"):
        load(train_file=[str(file)])
    assert load(train_file=[str(file)], validation_split_percentage=0).validation is None


def test_limits(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", TEXT)
    corpus = load(train_file=[str(file)], validation_split_percentage=50, max_train_samples=7, max_eval_samples=3)
    assert ("7 documents" in corpus.lines[0], "3 documents" in corpus.lines[1]) == (True, True)


def test_masked_blocks(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", TEXT)
    packed = load("mlm", train_file=[str(file)])
    each = load("mlm", train_file=[str(file)], line_by_line=True, block_size=8)
    assert isinstance(packed.train, MapBlocks)
    assert isinstance(each.train, MapBlocks)
    for block in packed.train:
        assert [len(block["input_ids"]), int(block["input_ids"][0]), int(block["input_ids"][-1])] == [16, 2, 3]
    assert len(each.train) == 57
    assert "documents cut short" in each.lines[0]


def test_a_stream(tmp_path: Path) -> None:
    files = {"train_file": [str(write(tmp_path, "a.jsonl", TEXT))], "streaming": True}
    corpus = load(**files, max_eval_samples=10)
    whole = load(train_file=files["train_file"], validation_split_percentage=0)
    assert not isinstance(corpus.train, MapBlocks)
    ids = [i for block in corpus.train for i in block["input_ids"]]
    tenth = sum(len(text.split()) + 1 for text in TEXT[:10])
    assert isinstance(whole.train, TokenBlocks)
    assert ids[:200] == whole.train.tokens.tolist()[tenth : tenth + 200]
    assert list(islice(corpus.train, 2)) == list(islice(corpus.train, 2))
    assert corpus.validation is not None
    with pytest.raises(DataError, match="less than 64 tokens"):
        load(**files, max_train_samples=2, max_eval_samples=1, block_size=64)


def test_blank_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", [*TEXT, "", "   "])
    corpus = load(train_file=[str(file)], validation_split_percentage=0)
    assert "2 empty documents skipped" in corpus.lines[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train_file": ["absent.txt"]}, "absent.txt does not exist"),
        ({"train_file": ["a.pdf"]}, r"a\.pdf: expected a file that ends in \.csv"),
        ({"train_file": ["empty"]}, "the folder empty holds no"),
        ({"train_file": ["a.jsonl", "a.csv"]}, "several kinds"),
        ({"train_file": ["numbers.jsonl"]}, r"without text.*number \(int64\)"),
        ({"train_file": ["two.jsonl"]}, "--text_column first or --text_column second"),
        ({"train_file": ["a.jsonl"], "text_column": "body"}, r"text \(string\), number \(int64\)"),
        ({"train_file": ["a.jsonl"], "text_column": "number"}, "holds int64: expected text"),
        ({"train_file": ["small.jsonl"], "validation_split_percentage": 0}, "expected at least 16, one block"),
        ({"train_file": ["broken.jsonl"]}, r"broken\.jsonl cannot be read"),
        ({"train_file": ["empty.jsonl"]}, r"empty\.jsonl is empty"),
        ({"train_file": ["latin.txt"]}, r"latin\.txt cannot be read.*UTF-8"),
        ({"dataset_name": "no-such-folder/nor-dataset"}, "cannot be read"),
        ({"dataset_name": "empty"}, "the folder empty holds no"),
    ],
)
def test_what_cannot_be_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "a.csv"):
        write(tmp_path, name, TEXT)
    write(tmp_path, "small.jsonl", TEXT[:1])
    (tmp_path / "a.pdf").write_text("%PDF")
    (tmp_path / "empty").mkdir()
    (tmp_path / "numbers.jsonl").write_text('{"number": 1}\n{"number": 2}\n')
    (tmp_path / "two.jsonl").write_text('{"first": "a", "second": "b", "third": 3}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\n{"text"')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 50)
    with pytest.raises(DataError, match=message):
        load(**data)


types = st.sampled_from(["string", "large_string", "int64", "list"])


@given(st.dictionaries(st.sampled_from("abcdef"), types, max_size=5))
def test_a_text_column_is_found_or_the_columns_are_named(columns: dict[str, str]) -> None:
    texts = [name for name, kind in columns.items() if "string" in kind]
    if len(texts) == 1:
        assert find_text_column(columns) == texts[0]
        return
    with pytest.raises(DataError) as caught:
        find_text_column(columns)
    assert all(name in str(caught.value) for name in (texts or columns))


def test_text_is_preferred_to_other_strings() -> None:
    assert find_text_column({"title": "string", "text": "string"}) == "text"
    assert find_text_column({"title": "string", "text": "string"}, "title") == "title"


def test_a_seed_changes_the_split(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", TEXT)
    data = DataSettings(train_file=[str(file)], validation_split_percentage=30, dedup_validation=False)
    held = [load_corpus(data, causal_tokenizer(), task="clm", block_size=16, seed=seed).validation for seed in (0, 1)]
    assert all(isinstance(blocks, TokenBlocks) for blocks in held)
    assert not torch.equal(*(torch.tensor(blocks.tokens[:60]) for blocks in held if blocks is not None))
