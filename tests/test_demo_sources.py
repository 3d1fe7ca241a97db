"""Where the demo gets its weights and its text from."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from real_models import smollm2_folder
from versions import BEFORE_5

from hf_geglu.demo import text, weights, wheels
from hf_geglu.demo.gguf_llama import GgufLlama
from hf_geglu.demo.weights import PackagedModel, model_folder
from hf_geglu.demo.wheels import Wheel
from hf_geglu.errors import DataError, WeightsError
from hf_geglu.training.reports.picture import loss_curves, spread

gguf = pytest.importorskip("gguf")

# --- a wheel of our own, so that no test of the plumbing needs the network ---


def small_wheel(folder: Path, *, content: bytes = b"weights") -> Path:
    path = folder / "small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("small_model/weights.bin"), content)
        archive.writestr(zipfile.ZipInfo("small_model-1.0.dist-info/METADATA"), "Name: small-model\nVersion: 1.0\n")
        archive.writestr(zipfile.ZipInfo("small_model-1.0.dist-info/WHEEL"), "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_small(wheel: Path, folder: Path) -> None:
    wheels.take(wheel, {"small_model/weights.bin": "weights.bin"}, folder)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip that sees one folder with one wheel, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    return folder


@pytest.fixture
def without_pip(monkeypatch, tmp_path):
    """The wheel is copied instead: a start of pip takes a second or more."""
    wheel = small_wheel(tmp_path)
    monkeypatch.setattr(weights, "download", lambda _, folder, progress: Path(shutil.copy(wheel, folder)))
    return wheel


def packaged(wheel: Path, **changes) -> PackagedModel:
    fields = {"requirement": "small-model==1.0", "sha256": sha256(wheel), "megabytes": 1}
    return PackagedModel("small", Wheel(**{**fields, **changes}), build_small, files=("weights.bin",))


def everything(folder: Path) -> list[str]:
    """All that is in a cache, but for the locks."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock")


def test_folder_is_made_once_from_the_wheel_that_pip_finds(index, tmp_path, monkeypatch):
    model = packaged(small_wheel(index))
    said: list[str] = []
    folder = model_folder(model, tmp_path / "cache", progress=said.append)
    assert (folder / "weights.bin").read_bytes() == b"weights"
    assert everything(tmp_path / "cache") == ["demo-1", "demo-1/small", "demo-1/small/weights.bin"]
    assert len(said) == 2
    assert not [line for line in said if str(tmp_path) in line]

    monkeypatch.setattr(weights, "download", lambda *args, **kwargs: pytest.fail("downloaded again"))
    began = time.perf_counter()
    assert model_folder(model, tmp_path / "cache") == folder
    assert time.perf_counter() - began < 0.1


def test_other_bytes_are_refused_and_nothing_stays(index, tmp_path):
    model = packaged(small_wheel(index))
    small_wheel(index, content=b"evil")
    with pytest.raises(WeightsError, match=r"has sha256 .*, expected .*damaged.*--model ID_OR_FOLDER") as caught:
        model_folder(model, tmp_path / "cache")
    assert caught.value.__cause__ is None  # so that tests with real weights fail instead of being skipped
    assert everything(tmp_path / "cache") == ["demo-1"]


def test_unreachable_index_says_what_to_do(index, tmp_path):
    with pytest.raises(WeightsError, match=r"small-model==1\.0 could not be had.*--model ID_OR_FOLDER") as caught:
        model_folder(packaged(small_wheel(tmp_path)), tmp_path / "cache")
    assert isinstance(caught.value.__cause__, subprocess.CalledProcessError)
    assert str(tmp_path) not in str(caught.value)
    assert everything(tmp_path / "cache") == ["demo-1"]


def test_python_without_pip_is_named(tmp_path, monkeypatch):
    failure = subprocess.CalledProcessError(1, "pip", stderr="/some/where/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: (_ for _ in ()).throw(failure))
    with pytest.raises(WeightsError, match="this Python has no pip") as caught:
        wheels.download(Wheel("small-model==1.0", "00", 1), tmp_path, progress=print)
    assert "/some/where" not in str(caught.value)


def test_missing_member_is_named(tmp_path):
    with pytest.raises(WeightsError, match="holds no small_model/other"):
        wheels.take(small_wheel(tmp_path), {"small_model/other": "other"}, tmp_path)


def test_place_that_cannot_be_written(without_pip, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(WeightsError, match="set HF_GEGLU_CACHE"):
        model_folder(packaged(without_pip), tmp_path / "cache")


@pytest.mark.parametrize("failure", [RuntimeError("full"), KeyboardInterrupt()])
def test_failing_build_leaves_nothing(without_pip, tmp_path, failure):
    def build(wheel: Path, folder: Path) -> None:
        build_small(wheel, folder)
        assert not (tmp_path / "cache/demo-1/small").exists()
        raise failure

    model = packaged(without_pip)
    with pytest.raises(type(failure)):
        model_folder(PackagedModel("small", model.wheel, build, model.files), tmp_path / "cache")
    assert everything(tmp_path / "cache") == ["demo-1"]


KILLED = """
import os, signal, sys
from pathlib import Path
from hf_geglu.demo.weights import PackagedModel, model_folder
from hf_geglu.demo.wheels import Wheel

def build(wheel, folder):
    (folder / "weights.bin").write_bytes(b"wei")
    os.kill(os.getpid(), signal.SIGKILL)

wheel = Wheel("small-model==1.0", sys.argv[2], 1)
model_folder(PackagedModel("small", wheel, build, ("weights.bin",)), Path(sys.argv[1]))
"""


def test_what_a_killed_run_left_is_tidied_up(without_pip, tmp_path):
    for rest in (".small.x1.download", ".small.x2.partial", ".other.x3.partial"):
        (tmp_path / "cache/demo-1" / rest).mkdir(parents=True)
    model_folder(packaged(without_pip), tmp_path / "cache")
    assert everything(tmp_path / "cache/demo-1") == [".other.x3.partial", "small", "small/weights.bin"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_run_leaves_no_half_folder_and_the_next_one_tidies_up(index, tmp_path):
    wheel = small_wheel(index)
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "cache", sha256(wheel)], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "cache/demo-1/small").exists()
    assert len(everything(tmp_path / "cache")) > 1  # what the killed one could not take away
    model_folder(packaged(wheel), tmp_path / "cache")
    assert everything(tmp_path / "cache") == ["demo-1", "demo-1/small", "demo-1/small/weights.bin"]


def test_folder_that_lost_a_file_is_made_again(without_pip, tmp_path):
    model = packaged(without_pip)
    folder = model_folder(model, tmp_path / "cache")
    (folder / "weights.bin").rename(folder / "else.bin")
    assert everything(model_folder(model, tmp_path / "cache")) == ["weights.bin"]


def test_of_several_callers_one_makes_the_folder(without_pip, tmp_path):
    builds: list[int] = []

    def build(wheel: Path, folder: Path) -> None:
        builds.append(1)
        time.sleep(0.2)
        build_small(wheel, folder)

    small = packaged(without_pip)
    model = PackagedModel("small", small.wheel, build, small.files)
    callers = [threading.Thread(target=model_folder, args=(model, tmp_path / "cache")) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(builds) == 1
    assert everything(tmp_path / "cache") == ["demo-1", "demo-1/small", "demo-1/small/weights.bin"]


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_GEGLU_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert wheels.cache_root() == tmp_path / "own"
    monkeypatch.delenv("HF_GEGLU_CACHE")
    assert wheels.cache_root() == tmp_path / "shared" / "hf_geglu"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert wheels.cache_root() == Path.home() / ".cache" / "hf_geglu"


# --- GGUF ---

HIDDEN, WIDTH, HEADS, KV_HEADS = 64, 96, 4, 2
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's printable bytes


def small_gguf(path: Path, *, architecture: str = "llama", bad: float | None = None, tied: bool = True) -> None:
    """A Llama of two layers with Q4_1 weights and a vocabulary of bytes and one merge."""
    draw = np.random.default_rng(0)
    letters = [chr(byte) for byte in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "th"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].role }}: {{ messages[0].content }}")

    def add(name: str, *shape: int) -> None:
        values = draw.normal(size=shape).astype(np.float32)
        if len(shape) == 1 or bad is not None:
            values.flat[0] = bad if bad is not None else 1
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0 if name.startswith("token") else gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", len(tokens), HIDDEN)
    for layer in range(2):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        add(f"blk.{layer}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", WIDTH, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", WIDTH, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(BEFORE_5, reason="transformers 4 cannot read this tokenizer out of a GGUF itself")
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_gives_what_transformers_gives(tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small_gguf(tmp_path / "small.gguf", tied=tied)
    folder = tmp_path / "folder"
    folder.mkdir()
    GgufLlama(tmp_path / "small.gguf").write(folder)
    ours = AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf").eval()
    assert ours.config.tie_word_embeddings is tied
    assert ours.dtype == torch.float32
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sample = "the 1234 thin\n\n  things<|im_end|>"
    ids = tokenizer(sample)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tmp_path, gguf_file="small.gguf")(sample)["input_ids"]
    assert tokenizer.decode(ids) == sample
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi"
    ours.save_pretrained(tmp_path / "again")  # Transformers refuses this for `theirs`


def test_gguf_keeps_each_product_of_the_quantisation_exactly(tmp_path):
    small_gguf(tmp_path / "small.gguf")
    block = gguf.GGUFReader(tmp_path / "small.gguf").tensors
    raw = next(tensor for tensor in block if tensor.name == "blk.0.ffn_up.weight").data
    halves = raw[:, :4].copy().view(np.float16).astype(np.float64)
    quants = np.concatenate([raw[:, 4:20] & 15, raw[:, 4:20] >> 4], axis=1)  # the first block of 32 in each row
    expected = halves[:, :1] * quants + halves[:, 1:]
    found = GgufLlama(tmp_path / "small.gguf").tensors()["model.layers.0.mlp.up_proj.weight"][:, :32].double()
    # d q is exact in float32 (15 bits); only the sum with m may be rounded, once
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=2**-24, atol=2**-24)


def test_other_files_are_refused(tmp_path):
    small_gguf(tmp_path / "other.gguf", architecture="qwen2")
    with pytest.raises(WeightsError, match=r"general\.architecture is 'qwen2'"):
        GgufLlama(tmp_path / "other.gguf")
    (tmp_path / "none.gguf").write_bytes(b"no GGUF at all")
    with pytest.raises(WeightsError, match=r"none\.gguf is no GGUF file"):
        GgufLlama(tmp_path / "none.gguf")
    small_gguf(tmp_path / "bad.gguf", bad=float("nan"))
    with pytest.raises(WeightsError, match="NaN or infinite"):
        GgufLlama(tmp_path / "bad.gguf").tensors()


# --- the real ones ---

PROSE = """\
The first railways were built to carry coal from the mines to the rivers. Horses drew the wagons along rails of wood,
and later of iron, because a horse can pull far more on a smooth rail than on a muddy road. When the steam engine had
become small enough to be put on wheels, it took the place of the horse. Within thirty years there were lines between
all the large cities of the country, and people who had never left their village could see the sea for the price of a
day's work. Goods became cheaper, newspapers arrived on the day they were printed, and every town had to set its clocks
to the same time."""


def test_smollm2_knows_english():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    assert json.loads((folder / "config.json").read_text())["hidden_act"] == "silu"
    assert "apache-2.0" in (folder / "README.md").read_text()
    assert "Apache License" in (folder / "LICENSE").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    tokens = tokenizer(PROSE, return_tensors="pt").input_ids
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    answer = tokenizer(prompt + "The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        perplexity = model(tokens, labels=tokens).loss.exp()
        following = model(answer).logits[0, -1].argmax()
    assert perplexity < 45  # 30.1 measured; thousands with q and k in a wrong order
    assert tokenizer.decode(following) == " Paris"


def test_real_folder_is_found_again_at_once():
    folder = smollm2_folder()
    began = time.perf_counter()
    assert weights.smollm2_folder() == folder
    assert time.perf_counter() - began < 0.1


# --- text ---


@pytest.fixture(scope="module")
def documents():
    return text.stdlib_documents()


def paragraphs(texts) -> set[str]:
    keys = {text.paragraph_key(part) for whole in texts for part in whole.split("\n\n")}
    return {key for key in keys if len(key) >= 60}


def test_text_is_enough_and_always_the_same(documents):
    corpus = text.split(documents, held_out=0.2, seed=0)
    assert sum(map(len, corpus.train)) > 600_000  # characters; four make a token
    assert sum(map(len, corpus.held_out)) > 120_000
    assert text.split(documents, held_out=0.2, seed=0) == corpus
    assert text.split(documents, held_out=0.2, seed=1) != corpus


@pytest.mark.parametrize("seed", [0, 1])
def test_no_module_and_no_paragraph_is_on_both_sides(documents, seed):
    corpus = text.split(documents, held_out=0.2, seed=seed)
    assert not paragraphs(corpus.train) & paragraphs(corpus.held_out)
    group = {document.text: document.group for document in documents}
    assert not {group[one] for one in corpus.train} & {group[one] for one in corpus.held_out}
    assert len(corpus.train) + len(corpus.held_out) == len(documents)
    share = sum(map(len, corpus.held_out)) / sum(len(document.text) for document in documents)
    assert 0.2 <= share < 0.3


def test_repeats_and_tables_are_dropped():
    sentence = "A sentence that is long enough to be told apart from any other one by its words. "
    first = text.Document("a", "\n\n".join([sentence * 2, sentence * 3]))
    again = text.Document("b", "\n\n".join([sentence.upper() * 2, "Another " + sentence * 5]))
    table = text.Document("c", "+---+---+\n" * 60)
    assert list(text.without_repeats([first, again, first, table])) == [
        text.Document("a", first.text.strip().replace(". \n", ".\n")),
        text.Document("b", ("Another " + sentence * 5).strip()),
    ]


def test_docstrings_are_read_and_not_run(tmp_path):
    long = "It does what it says. " * 20
    (tmp_path / "_pymodule.py").write_text(
        f'"""{long}module"""\nraise SystemExit\nif True:\n    class A:\n        """{long}class"""\n'
        f'        async def f(self):\n            """{long}method"""\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text(f'"""{long}"""')
    found = list(text._docstrings(tmp_path))
    assert [document.text.removeprefix(long) for document in found] == ["module", "class", "method"]
    assert {document.group for document in found} == {"module"}


def test_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(text, "_topics", list)
    with pytest.raises(DataError, match="no documentation found"):
        text.stdlib_documents()


def test_dataset_has_one_column():
    pytest.importorskip("datasets")
    dataset = text.as_dataset(("one", "two"))
    assert dataset.column_names == ["text"]
    assert list(dataset["text"]) == ["one", "two"]


# --- picture ---


def test_picture_is_a_png_of_the_stated_size(tmp_path):
    pytest.importorskip("matplotlib")
    curves = {"original": [(0, 3.0), (10, 2.8)], "converted": [(0, 3.01), (10, 2.8)], "naive": [(0, 4.0)]}
    before = set(sys.modules)  # tensorboard imports pyplot too
    path = loss_curves(tmp_path / "loss.png", curves, marks={"untrained": 3.0}, title="Loss")
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")) == (1440, 810)
    assert "matplotlib.pyplot" not in set(sys.modules) - before


@pytest.mark.parametrize("curves", [{}, {"empty": []}])
def test_nothing_to_draw_is_said(tmp_path, curves):
    with pytest.raises(DataError, match="no points to draw"):
        loss_curves(tmp_path / "loss.png", curves)


def test_labels_are_moved_apart_and_stay_in_order():
    placed = spread([0.1, 0.5, 0.5, 0.51, 0.99], gap=0.1, low=0.0, high=1.0)
    assert placed == pytest.approx([0.1, 0.4, 0.5, 0.605, 0.99], abs=0.06)
    assert all(later - earlier >= 0.1 - 1e-9 for earlier, later in itertools.pairwise(placed))
    assert spread([0.2, 0.8], gap=0.1, low=0.0, high=1.0) == [0.2, 0.8]
