"""Writes small variants with their outputs to tests/written/VERSION, for other versions of transformers to read.

.venv-floor/bin/python tests/write_variants.py        # after `make test-floor`
.venv/bin/python tests/write_variants.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from fresh_process import expected_outputs
from tiny_models import tiny

import hf_geglu

TYPES = (
    "bert",
    "gpt2",
    "opt",
    "llama",
    "mixtral",
    "t5",
    "esm",
    "whisper",
    "bart",
    "phi3",
    "vit",
    "deit",
    "swin",
    "dinov2",
)
"""Dense in every layout, gated, experts, called in `forward`; vision models whose modules transformers 5 has moved."""
WRITTEN = Path(__file__).parent / "written"


def main() -> None:
    """One folder for each type."""
    torch.set_num_threads(1)
    root = WRITTEN / transformers.__version__
    shutil.rmtree(root, ignore_errors=True)
    for model_type in TYPES:
        model = tiny(model_type)
        hf_geglu.convert(model, verify="sites")
        model.save_pretrained(root / model_type)
        expected_outputs(model, root / model_type / "expected.safetensors")
        (root / model_type / "modeling_geglu.py").unlink(missing_ok=True)  # the plugin reads them


if __name__ == "__main__":
    main()
