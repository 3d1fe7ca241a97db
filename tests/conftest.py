"""Settings that every test shares."""

import os
from pathlib import Path

# MKL picks its kernels by the shape of a product, so that widening a projection moves a sum's last bit (1e-16) however
# the weights are arranged. This setting makes each output's arithmetic independent of the matrix's width; what is
# left of a difference in float64 is then the conversion's. It must be set before torch is imported.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import huggingface_hub
import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models; xdist's workers share the cores


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a cache of its own, and no Hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here
