"""Compiled and exported: torch.compile without a graph break, torch.export, ONNX through onnxruntime."""

import warnings

import pytest
import torch
from tiny_models import TINY, tiny

import hf_geglu
from hf_geglu.inputs import synthetic_inputs

MODELS = ["bert", "gpt2", "vit", "llama"]


def _variant(tmp_path, model_type):
    """A converted model, saved and loaded again, and inputs for it. Caches are no tensors and stay out of graphs."""
    model = tiny(model_type)
    hf_geglu.convert(model)
    model.save_pretrained(tmp_path / "v")
    loaded = TINY[model_type][0].from_pretrained(tmp_path / "v").eval()
    loaded.config.use_cache = False
    return loaded, synthetic_inputs(loaded)


@pytest.mark.parametrize("model_type", MODELS)
def test_compiles_in_one_graph(tmp_path, model_type):
    model, inputs = _variant(tmp_path, model_type)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", MODELS)
def test_exports(tmp_path, model_type):
    model, inputs = _variant(tmp_path, model_type)
    with torch.no_grad():
        program = torch.export.export(model, (), dict(inputs), strict=False)
        torch.testing.assert_close(program.module()(**inputs)[0], model(**inputs)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", MODELS)
def test_onnx_runtime_computes_the_same(tmp_path, model_type):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, inputs = _variant(tmp_path, model_type)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(model, (), tmp_path / "model.onnx", kwargs=dict(inputs), dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {node.name: inputs[node.name].numpy() for node in session.get_inputs()}
    found = torch.from_numpy(session.run(None, feeds)[0])
    with torch.no_grad():
        torch.testing.assert_close(found, model(**inputs)[0], rtol=1e-4, atol=1e-5)
