"""200 damaged checkpoints: each is refused with an error of ours, or is harmless; none hangs, crashes the interpreter,
fills the memory, or writes anywhere but into the target."""

import json
import resource
import shutil
import struct

import pytest
from checkpoints import files_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny

from hf_geglu.checkpoint import convert_checkpoint
from hf_geglu.errors import HfGegluError
from hf_geglu.files import check_weights

CONFIG, INDEX = "config.json", "model.safetensors.index.json"

numbers = st.one_of(
    st.integers(-3, 100), st.sampled_from([2**31, 2**63, 2**64, 10**100, -(2**40), 10**9]), st.floats(allow_nan=True)
)
texts = st.sampled_from(
    ["", "gelu", "silu", "nonsense", "../x", "/etc/passwd", "\x00", "F32", "BF16", "F64", "x" * 5000]
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Sound ones, by model type: name of file -> bytes."""
    found = {}
    for model_type in ("bert", "llama"):
        folder = tmp_path_factory.mktemp(model_type)
        tiny(model_type).save_pretrained(folder, max_shard_size="20KB")
        found[model_type] = files_in(folder)
    return found


def _edit_json(draw, content, *, depth=3):
    """Change one place, at any depth."""
    node = content
    for _ in range(draw(st.integers(0, depth))):
        inner = [
            value for value in (node.values() if isinstance(node, dict) else node) if isinstance(value, dict | list)
        ]
        inner = [value for value in inner if value]
        if not inner:
            break
        node = draw(st.sampled_from(inner))
    if isinstance(node, list):
        node[draw(st.integers(0, len(node) - 1))] = draw(values)
        return content
    key = draw(st.sampled_from(sorted(node)))
    what = draw(st.sampled_from(["value", "value", "value", "remove", "rename", "copy"]))
    if what == "value":
        node[key] = draw(values)
    elif what == "copy":
        node[draw(texts) or "copy"] = node[key]
    else:
        value = node.pop(key)
        if what == "rename":
            node[draw(texts)] = value
    return content


def _damaged_bytes(draw, content):
    data = bytearray(content)
    what = draw(st.sampled_from(["flip", "cut", "grow", "insert", "zero"]))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    if what == "flip":
        for _ in range(draw(st.integers(1, 8))):
            data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
    elif what == "cut":
        del data[place:]
    elif what == "grow":
        data += draw(st.binary(min_size=1, max_size=100))
    elif what == "insert":
        data[place:place] = draw(st.binary(min_size=1, max_size=20))
    else:
        data[place : place + 16] = bytes(len(data[place : place + 16]))
    return bytes(data)


KINDS = ["header", "header", "length", "shard", "index", "index text", "config", "config", "config text", "lost"]


def _apply(draw, files, kind):
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    shard = draw(st.sampled_from(shards))
    if kind in ("header", "length"):
        (length,) = struct.unpack("<Q", files[shard][:8])
        text, data = files[shard][8 : 8 + length], files[shard][8 + length :]
        if kind == "length":
            length = draw(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 5000)))
        elif draw(st.booleans()):
            text = json.dumps(_edit_json(draw, json.loads(text))).encode()
            length = len(text)
        else:
            text = _damaged_bytes(draw, text)
            length = len(text)
        files[shard] = struct.pack("<Q", length) + text + data
    elif kind == "shard":
        files[shard] = _damaged_bytes(draw, files[shard])
    elif kind in ("index", "config"):
        name = INDEX if kind == "index" else CONFIG
        files[name] = json.dumps(_edit_json(draw, json.loads(files[name]))).encode()
    elif kind in ("index text", "config text"):
        name = INDEX if kind == "index text" else CONFIG
        files[name] = _damaged_bytes(draw, files[name])
    else:
        del files[draw(st.sampled_from(sorted(files)))]


outcomes = {"refused": 0, "harmless": 0}


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    database=None,
)
@given(data=st.data(), model_type=st.sampled_from(["bert", "llama"]))
def test_damaged_checkpoints(data, model_type, checkpoints, tmp_path_factory):
    kind = data.draw(st.sampled_from(KINDS))
    files = dict(checkpoints[model_type])
    _apply(data.draw, files, kind)
    place = tmp_path_factory.mktemp("case")
    base = place / "base"
    base.mkdir()
    for name, content in files.items():
        (base / name).write_bytes(content)
    memory, error, done = _peak(), None, None
    try:
        done = convert_checkpoint(base, place / "out")
    except HfGegluError as refusal:
        error = refusal
    if error is not None:
        outcomes["refused"] += 1
        assert len(str(error)) > 20
        assert str(place) not in str(error)
        assert [path.name for path in place.iterdir()] == ["base"]
    else:
        outcomes["harmless"] += 1
        assert done is not None
        assert sorted(path.name for path in place.iterdir()) == ["base", "out"]
        check_weights(place / "out")
        assert done.tensors
    assert files_in(base) == files
    assert _peak() - memory < 300 * 2**20
    shutil.rmtree(place)


def test_most_of_them_were_refused():
    """The damage was damage: what is harmless are changed numbers and entries that nobody reads."""
    assert outcomes["refused"] > 100 or sum(outcomes.values()) == 0  # run alone


@pytest.mark.parametrize("text", [b"[" * 10**6, b'{"a":' * 10**5, b"9" * 10**5, b"\xff\xfe", b'{"a": NaN}', b"null"])
@pytest.mark.parametrize("file", [CONFIG, INDEX, "header"])
def test_texts_that_break_parsers(checkpoints, tmp_path, file, text):
    base = tmp_path / "base"
    base.mkdir()
    files = dict(checkpoints["bert"])
    if file == "header":
        file = min(name for name in files if name.endswith(".safetensors"))
        text = struct.pack("<Q", len(text)) + text
    files[file] = text
    for name, content in files.items():
        (base / name).write_bytes(content)
    with pytest.raises(HfGegluError):
        convert_checkpoint(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
