"""A checkpoint that is calibrated and converted layer by layer is what loading, calibrating, converting and saving it
gives."""

import pytest
import torch
from calibration_inputs import lively
from checkpoints import SHARD, files_in, weights_in
from test_calibration import CASES, inputs_for
from tiny_models import tiny

import hf_geglu
from hf_geglu.checkpoint import convert_checkpoint

ROUNDED = {"t5": "an encoder's output gets gradients from several layers, which are added in another order"}


def base(tmp_path, case, **more):
    model = lively(tiny(case, **CASES.get(case, {}) | more))
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base", type(model)


def both(tmp_path, case, given, **settings):
    source, model_class = base(tmp_path, case)
    model = model_class.from_pretrained(source)
    report = hf_geglu.convert(model, calibration=given, verify="sites", **settings)
    model.save_pretrained(tmp_path / "memory", max_shard_size=SHARD)
    done = convert_checkpoint(source, tmp_path / "out", calibration=given, max_shard_size=SHARD, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "memory", "out"]
    return report, done


@pytest.mark.parametrize("case", CASES)
def test_the_same_files(tmp_path, case):
    report, done = both(tmp_path, case, inputs_for(case))
    assert done.report.note.endswith(report.note.split("; ", 1)[-1]) or report.note in done.report.note
    expected, found = files_in(tmp_path / "memory"), files_in(tmp_path / "out")
    if case in ROUNDED or "in parts" in done.report.note:
        parts = weights_in(tmp_path / "memory"), weights_in(tmp_path / "out")
        assert parts[0].keys() == parts[1].keys()
        for name, tensor in parts[0].items():
            if case in ROUNDED:
                torch.testing.assert_close(tensor, parts[1][name], rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(tensor, parts[1][name]), name
        expected, found = ({n: f[n] for n in f if ".safetensors" not in n} for f in (expected, found))
    assert sorted(expected) == sorted(found)
    assert [name for name in expected if expected[name] != found[name]] == []
