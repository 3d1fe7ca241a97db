"""Where results go: benchmarks/results/NAME.json, with the versions that gave them and nothing that names a machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def earlier(name: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the record that is there, if it was made with the same settings; none otherwise."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return []
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return list(found["rows"]) if all(found.get(key) == value for key, value in settings.items()) else []


def write(name: str, content: dict[str, Any]) -> None:
    """Write one record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        **content,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
