"""What stands in the way of a conversion is said in a sentence, and nothing is written."""

import errno
import json
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from checkpoints import edit_config, edit_weights, files_in, weights_in
from safetensors.torch import load_file, save_file
from tiny_models import tiny

from hf_geglu.checkpoint import convert_checkpoint, layout, proof, stream
from hf_geglu.errors import HfGegluError, OutputError, PlanError, VerificationError, WeightsError
from hf_geglu.files.header import read_header


@pytest.fixture
def base(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


def _refused(base, error, match, **settings):
    before = files_in(base)
    with pytest.raises(error, match=match) as caught:
        convert_checkpoint(base, base.parent / "out", **settings)
    assert sorted(path.name for path in base.parent.iterdir()) == [base.name]
    assert files_in(base) == before
    assert str(base.parent) not in str(caught.value)  # a name, never a path


def _index(base):
    return base / "model.safetensors.index.json"


def _edit_index(base, edit):
    index = json.loads(_index(base).read_text())
    _index(base).write_text(json.dumps(edit(index)))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", "sub/model.safetensors", "a\\b", ""])
def test_index_that_leads_out_of_the_folder(base, file):
    def edit(index):
        name = next(iter(index["weight_map"]))
        return {"weight_map": {**index["weight_map"], name: file}}

    _edit_index(base, edit)
    _refused(base, WeightsError, "leads out of the folder")


def test_index_that_is_no_index(base):
    _index(base).write_text('{"weight_map": []}')
    _refused(base, WeightsError, "no `weight_map`")
    _index(base).write_text("{")
    _refused(base, WeightsError, "damaged")


def test_tensor_in_two_files(base):
    shards = sorted(base.glob("*.safetensors"))
    one, two = (load_file(path) for path in shards[:2])
    name = next(iter(one))
    save_file({**two, name: one[name]}, shards[1], metadata={"format": "pt"})
    _refused(base, WeightsError, f"{name} is in .* and in|holds {name}, which the index places in")


def test_tensor_named_twice_in_a_header(base):
    edit_weights(base, lambda tensors: tensors)
    path = base / "model.safetensors"
    header = read_header(path)
    content = path.read_bytes()
    text = content[8 : header.data].rstrip()
    name = header.entries[-1].name
    text = text[:-1] + f',"{name}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[header.data :])
    _refused(base, WeightsError, "twice")


def test_index_and_files_disagree(base):
    _edit_index(
        base, lambda index: {"weight_map": {**index["weight_map"], "ghost": sorted(index["weight_map"].values())[0]}}
    )
    _refused(base, WeightsError, "places ghost in")


@pytest.mark.parametrize("keep", [0, 4, 40, -1, -1000])
def test_truncated(base, keep):
    shard = sorted(base.glob("*.safetensors"))[0]
    os.truncate(shard, keep if keep >= 0 else shard.stat().st_size + keep)
    _refused(base, WeightsError, shard.name)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 0])
def test_absurd_length_of_a_header(base, length):
    shard = sorted(base.glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(max(shard.stat().st_size, length + 8 if length == 10**8 + 1 else 0))  # sparse
    _refused(base, WeightsError, shard.name)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, "dtype 'F4'"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "impossible"),
        ({"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}, "impossible"),
        ({"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}, "its shape needs"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "leaves a hole"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "nothing usable"),
        (7, "nothing usable"),
    ],
)
def test_headers_that_lie(tmp_path, entry, message):
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(WeightsError, match=message):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("model_type", ["bert", "llama", "phi3", "gpt2"])
def test_not_finite_where_it_changes(tmp_path, model_type, value):
    base = tmp_path / "base"
    tiny(model_type).save_pretrained(base)
    name = {
        "bert": "bert.encoder.layer.1.intermediate.dense.weight",
        "llama": "model.layers.0.mlp.up_proj.weight",
        "phi3": "model.layers.0.mlp.gate_up_proj.weight",
        "gpt2": "transformer.h.0.mlp.c_fc.weight",
    }[model_type]

    def edit(tensors):
        tensors[name].view(-1)[-1] = value
        return tensors

    edit_weights(base, edit)
    _refused(base, WeightsError, f"{name} in model.safetensors holds NaN or infinite")


def test_leaves_the_range_of_its_dtype(tmp_path):
    base = tmp_path / "base"
    tiny("opt").save_pretrained(base)
    edit_weights(base, lambda tensors: {n: t + 600 if "fc1" in n else t for n, t in tensors.items()})
    _refused(base, WeightsError, r"fc1.*not finite in torch\.float16", dtype="float16")  # 128 * 600
    edit_weights(base, lambda tensors: {n: t + 1e6 if "fc2" in n else t for n, t in tensors.items()})
    _refused(base, WeightsError, r"not finite in torch\.float16", dtype="float16")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "nonsense"])
def test_dtypes_that_hold_no_weights(base, dtype):
    _refused(base, PlanError, "expected 'auto'", dtype=dtype)


def test_weights_in_whole_numbers(base):
    edit_weights(base, lambda t: {n: v.to(torch.int8) if "intermediate.dense.weight" in n else v for n, v in t.items()})
    _refused(base, WeightsError, "intermediate.dense.weight.*int8")


def test_shapes_of_another_config(base):
    edit_config(base, intermediate_size=48)
    _refused(base, WeightsError, "do not belong together")


def test_more_layers_than_weights(base):
    edit_config(base, num_hidden_layers=10**9)
    _refused(base, WeightsError, "num_hidden_layers = 1000000000")
    edit_config(base, num_hidden_layers=900)
    _refused(base, WeightsError, "more than .* parameters")


def test_a_block_is_lacking(base):
    edit_weights(base, lambda tensors: {n: t for n, t in tensors.items() if "layer.1.intermediate" not in n})
    _refused(base, WeightsError, r"lacks 2 tensors.*layer\.1\.intermediate")


def test_quantised_and_converted_checkpoints(base):
    edit_config(base, quantization_config={"quant_method": "gptq"})
    _refused(base, PlanError, "quantised")
    edit_config(base, quantization_config=None, geglu={"schema": 1})
    _refused(base, PlanError, "variant already")
    edit_config(base, geglu=None, transformers_weights="other.safetensors")
    _refused(base, PlanError, "a weights file of its own")


def test_pickled_objects_are_not_opened(base):
    for path in base.glob("*.safetensors*"):
        path.unlink()
    torch.save({"a": torch.zeros(1), "b": print}, base / "pytorch_model.bin")
    _refused(base, WeightsError, "pickled objects")
    torch.save(torch.zeros(3), base / "pytorch_model.bin")
    _refused(base, WeightsError, "no tensors by name")
    (base / "pytorch_model.bin").write_bytes(b"PK\x03\x04 no zip")
    _refused(base, WeightsError, "damaged|pickled")
    (base / "pytorch_model.bin").unlink()
    _refused(base, WeightsError, "no weights")


def test_outputs_that_must_not_be_written(base, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        convert_checkpoint(base, target)
    with pytest.raises(OutputError, match="same folder"):
        convert_checkpoint(base, base, overwrite=True)
    assert files_in(target) == {"mine": b"x"}
    convert_checkpoint(base, target, overwrite=True)
    assert not (target / "mine").exists()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="link to nothing"):
        convert_checkpoint(base, tmp_path / "link")


def test_links_in_the_source(base, tmp_path):
    """Weights may lie elsewhere; a tokenizer that is a link to somewhere else would be published with the variant."""
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    shard = sorted(base.glob("*.safetensors"))[0]
    shard.rename(elsewhere / shard.name)
    shard.symlink_to(elsewhere / shard.name)
    done = convert_checkpoint(base, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert done.tensors == len(weights_in(tmp_path / "out"))
    (elsewhere / "secret").write_text("key")
    (base / "tokenizer.json").symlink_to(elsewhere / "secret")
    with pytest.raises(WeightsError, match="symbolic link that leads out"):
        convert_checkpoint(base, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_planted_links_are_not_followed(base, tmp_path):
    """Someone else's link in the workplace, where a file is about to be written."""
    place = tmp_path / ".out.partial"
    place.symlink_to(tmp_path / "base")
    with pytest.raises(OutputError, match="in the way"):
        convert_checkpoint(base, tmp_path / "out")
    place.unlink()
    (place / "folder").mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("model.safetensors.draft", "config.json", "model.safetensors"):
        (place / "folder" / name).symlink_to(victim)
    convert_checkpoint(base, tmp_path / "out")
    assert victim.read_text() == "precious"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_two_at_once(base, tmp_path):
    from hf_geglu.files.folder import workplace

    with workplace(tmp_path / "out"), pytest.raises(OutputError, match="another process is writing out"):
        convert_checkpoint(base, tmp_path / "out")


def test_no_room_before_it_starts(base, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    _refused(base, OutputError, "bytes are needed, 10 are free")


_LIMITED = """
import resource, signal, sys
import hf_geglu
from hf_geglu.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    hf_geglu.convert_checkpoint(sys.argv[1], sys.argv[2])
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [100_000, 9_000])
def test_full_disk(tmp_path, limit):
    """A limit on the size of files stands in for a full disk: the system refuses the write half way."""
    base = tmp_path / "base"
    tiny("bert", vocab_size=4000).save_pretrained(base)
    run = [sys.executable, "-W", "ignore", "-c", _LIMITED, str(base), str(tmp_path / "out")]
    result = subprocess.run([*run, str(limit)], capture_output=True, text=True, check=True)
    assert "no room to write" in result.stdout
    assert "goes on where it stopped" in result.stdout
    assert not (tmp_path / "out").exists()
    done = convert_checkpoint(base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    assert done.tensors == len(weights_in(tmp_path / "out"))


def test_written_files_that_are_wrong_are_noticed(base, tmp_path, monkeypatch):
    """The verification reads what was written: one wrong tensor, and there is no target."""
    shard = layout._shard

    def wrong(name, group):
        group = list(group)
        for number, output in enumerate(group):
            if output.change is not None and len(output.shape) == 2:
                worse = layout.Change(lambda t, f=output.change.function: f(t) * 1.01, output.change.dim)
                group[number] = type(output)(**{k: getattr(output, k) for k in output.__slots__} | {"change": worse})
        return shard(name, group)

    monkeypatch.setattr(layout, "_shard", wrong)
    _refused(base, VerificationError, "planned to be exact")
    monkeypatch.setattr(layout, "_shard", shard)
    assert convert_checkpoint(base, tmp_path / "out", verify="none").report.sites == ()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_systems_that_cannot_copy_in_the_kernel(base, tmp_path, monkeypatch, code):
    expected = tmp_path / "expected"
    convert_checkpoint(base, expected)

    def cannot(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", cannot, raising=False)
    convert_checkpoint(base, tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(expected)
    monkeypatch.delattr(os, "copy_file_range")
    convert_checkpoint(base, tmp_path / "two")
    assert files_in(tmp_path / "two") == files_in(expected)


@pytest.mark.parametrize("piece", [1, 64, 200])
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "phi3", "convnext"])
def test_the_size_of_pieces_changes_nothing(tmp_path, monkeypatch, model_type, piece):
    tiny(model_type).save_pretrained(tmp_path / "base")
    convert_checkpoint(tmp_path / "base", tmp_path / "whole")
    monkeypatch.setattr(stream, "PIECE", piece)
    monkeypatch.setattr(stream, "COPY", piece * 7)
    monkeypatch.setattr(proof, "PIECE", piece)
    convert_checkpoint(tmp_path / "base", tmp_path / "pieces")
    assert files_in(tmp_path / "pieces") == files_in(tmp_path / "whole")


def test_what_goes_along(base, tmp_path):
    kept = {
        "tokenizer.json": b"{}",
        "vocab.txt": b"a",
        "spiece.model": b"\x00",
        "chat_template.jinja": b"{{ x }}",
        "LICENSE": b"Apache",
        "USE_POLICY.md": b"be good",
        "additional_chat_templates/tool.jinja": b"t",
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]).encode(),
        "1_Pooling/config.json": b"{}",
        "2_Dense/model.safetensors": b"whatever",
    }
    left = {
        "README.md": b"# the base",
        "pytorch_model.bin": b"old",
        "onnx/model.onnx": b"old",
        "original/params.json": b"{}",
        "training_args.bin": b"old",
        "optimizer.pt": b"old",
    }
    for name, content in (kept | left).items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    done = convert_checkpoint(base, tmp_path / "out")
    found = files_in(tmp_path / "out")
    assert {name: found[name] for name in kept} == kept
    assert sorted(done.left) == sorted(left)
    assert not left.keys() & found.keys()
    (base / "modules.json").write_text('[{"path": "../other"}]')
    with pytest.raises(HfGegluError, match="outside of its folder"):
        convert_checkpoint(base, tmp_path / "two")
