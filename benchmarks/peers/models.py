"""A model folder for a side to load, made in a process of its own (see benchmarks/speed/process.py)."""

from __future__ import annotations

from typing import Any


def measure(*, source: str, folder: str, dtype: str, converted: bool) -> str:
    """The model of `source` in that type, converted or as it is, written to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_geglu

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(source)
    if converted:
        hf_geglu.convert(model)
        hf_geglu.save_folder(model, folder, tokenizer=tokenizer)
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
