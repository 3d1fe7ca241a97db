"""transformers' own way to Liger, with a stand-in for the package: the same function names and switches, no triton."""

import subprocess
import sys

import pytest

MONKEY_PATCH = """
CALLS = []

def apply_liger_kernel_to_llama(rope: bool = True, rms_norm: bool = True, swiglu: bool = True, model=None) -> None:
    CALLS.append(("llama", swiglu, rms_norm))

def apply_liger_kernel_to_gemma2(rope: bool = True, rms_norm: bool = True, geglu: bool = True, model=None) -> None:
    CALLS.append(("gemma2", geglu, rms_norm))

MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_liger_kernel_to_llama, "gemma2": apply_liger_kernel_to_gemma2}

def _apply_liger_kernel_to_instance(model, **kwargs):
    function = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if function is not None:
        function(model=model, **kwargs)
"""
TRANSFORMERS = """
def __getattr__(name):
    import importlib
    return getattr(importlib.import_module("liger_kernel.transformers.monkey_patch"), name)
"""
SCRIPT = """
import sys, hf_geglu, transformers
assert not any(name.startswith("liger_kernel") for name in sys.modules)
sys.path.insert(0, "tests_folder")
from tiny_models import tiny
from hf_geglu.errors import KernelError

try:
    from transformers.integrations.liger import apply_liger_kernel
except ImportError:  # transformers 4: in Trainer's constructor
    def apply_liger_kernel(model, config):
        transformers.Trainer(model=model, args=transformers.TrainingArguments(
            output_dir="unused", report_to=[], use_cpu=True, use_liger_kernel=True, liger_kernel_config=config))

variant = tiny("llama")
hf_geglu.convert(variant)
for model in (tiny("llama"), variant, tiny("gemma2"), tiny("gemma2", hidden_activation="gelu")):
    apply_liger_kernel(model, None)
partly = tiny("llama")
hf_geglu.convert(partly, layers=0)
apply_liger_kernel(partly, None)
try:
    apply_liger_kernel(variant, {"swiglu": True})
except KernelError as error:
    assert "swiglu=False" in str(error)
else:
    raise AssertionError("asked for by name, it was let through")
from liger_kernel.transformers.monkey_patch import CALLS
assert CALLS == [("llama", True, True), ("llama", False, True), ("gemma2", True, True), ("gemma2", False, True)], CALLS
"""


@pytest.mark.parametrize("first", ["hf_geglu", "liger_kernel"])
def test_the_hook_that_trainer_calls(tmp_path, first, request):
    package = tmp_path / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(TRANSFORMERS)
    (package / "monkey_patch.py").write_text(MONKEY_PATCH)
    metadata = tmp_path / "liger_kernel-99.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: liger_kernel\nVersion: 99.0\n")
    script = SCRIPT.replace("tests_folder", str(request.path.parent))
    if first == "liger_kernel":
        script = "import liger_kernel.transformers.monkey_patch\n" + script.replace("assert not any", "assert any")
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", path + script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
