"""Variants written under one version of transformers are read under another: under 4.57 (`make test-floor`) what 5
wrote, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY
from write_variants import TYPES, WRITTEN

import hf_geglu  # noqa: F401 - registers the variants

FOLDERS = sorted(path for version in WRITTEN.iterdir() for path in version.iterdir())


def test_both_versions_are_there() -> None:
    versions = {path.parent.name.split(".")[0] for path in FOLDERS}
    assert versions == {"4", "5"}
    assert {path.name for path in FOLDERS} == set(TYPES)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_read(folder: Path) -> None:
    model, info = TINY[folder.name][0].from_pretrained(folder, dtype="auto", output_loading_info=True)
    tensors = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        outputs = model.eval()(**{name[3:]: tensor for name, tensor in tensors.items() if name.startswith("in.")})
    expected = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("out.")}
    assert expected
    # Swin's index of positions is a constant, which transformers 4 saves and 5 computes
    assert not [name for name in info["missing_keys"] if not name.endswith("relative_position_index")]
    for name, tensor in expected.items():
        # versions, and matrix libraries, order some sums differently; a wrong network is off by 1e-2 and more
        torch.testing.assert_close(outputs[name], tensor, rtol=1e-5, atol=2e-6)
