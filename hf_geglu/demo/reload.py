"""Run as a script, in a process of its own, without this package: does the saved variant give the same logits?

    python reload.py FOLDER AUTO_CLASS EXPECTED.safetensors

Prints the largest difference. Loads with ``trust_remote_code=True``, which a native variant does not need.
"""

import sys

import torch
import transformers
from safetensors.torch import load_file


def main(folder: str, auto_class: str, expected: str) -> None:
    """Reload, recompute, compare."""
    tensors = load_file(expected)
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(input_ids=tensors["input_ids"]).logits
    assert "hf_geglu" not in sys.modules
    print((logits - tensors["logits"]).abs().max().item())


if __name__ == "__main__":
    main(*sys.argv[1:])
