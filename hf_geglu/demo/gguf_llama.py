"""From a GGUF file of a Llama to the files that Transformers reads, without Transformers.

    Q4_1 block of 32 weights:  w = d q + m      d, m float16; q an integer of 4 bits
    Q8_0 block of 32 weights:  w = d q          d float16; q an integer of 8 bits

These products have up to 19 significant bits: float32 holds each of them exactly, bfloat16 (8 bits) would round all of
them a second time. So the tensors are written as float32, and "the original" of a comparison is the published file and
not a rounding of it.

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Transformers can load such files too
(`from_pretrained(..., gguf_file=...)`, to which the tests compare), but it takes twice as long, gives the tokenizer
GPT-2's rule for splitting instead of the one the file names, and does not save what it loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_geglu.errors import HfGegluError, WeightsError

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


class GgufLlama:
    """A GGUF file of the architecture "llama" with a byte-level BPE vocabulary.

    Raises:
        WeightsError: another architecture or vocabulary, or no GGUF at all.
        HfGegluError: the package `gguf` is missing.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise HfGegluError(
                "reading a GGUF file takes the package `gguf`. Install it: pip install 'hf_geglu[demo]'"
            ) from error
        try:
            self._reader = gguf.GGUFReader(path)
        except ValueError as error:
            raise WeightsError(f"{path.name} is no GGUF file: {error}. Download it again.") from error
        self._dequantize = gguf.quants.dequantize
        expected = {
            "general.architecture": ("llama",),
            "tokenizer.ggml.model": ("gpt2",),
            "tokenizer.ggml.pre": ("smollm",),
        }
        for key, allowed in expected.items():
            if (value := self.get(key)) not in allowed:
                raise WeightsError(f"{path.name}: {key} is {value!r}; this reader knows {', '.join(allowed)} only")

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the head of the file: text, a number, or a list of either."""
        field = self._reader.fields.get(key)
        if field is None:
            return default
        if len(field.types) > 1 and field.types[-1].name == "STRING":
            return [field.parts[index].tobytes().decode() for index in field.data]
        if len(field.types) > 1:
            return [field.parts[index][0].item() for index in field.data]
        part = field.parts[field.data[0]]
        return part.tobytes().decode() if field.types[0].name == "STRING" else part[0].item()

    def config(self) -> dict[str, Any]:
        """config.json, in the words that every version of Transformers reads."""
        hidden, heads = self.get("llama.embedding_length"), self.get("llama.attention.head_count")
        tied = "output.weight" not in {tensor.name for tensor in self._reader.tensors}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
            "head_dim": self.get("llama.rope.dimension_count", hidden // heads),
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": self.get("llama.feed_forward_length"),
            "max_position_embeddings": self.get("llama.context_length"),
            "mlp_bias": False,
            "num_attention_heads": heads,
            "num_hidden_layers": self.get("llama.block_count"),
            "num_key_value_heads": self.get("llama.attention.head_count_kv", heads),
            # float32 in the file: 9.999999747e-06 is what 1e-5 was before
            "rms_norm_eps": float(f"{self.get('llama.attention.layer_norm_rms_epsilon'):.7g}"),
            "rope_theta": self.get("llama.rope.freq_base", 10000.0),
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
            "vocab_size": len(self.get("tokenizer.ggml.tokens")),
        }

    def tensors(self) -> dict[str, Tensor]:
        """All weights in float32, under the names of LlamaForCausalLM.

        Raises:
            WeightsError: a tensor that a Llama does not have, or one that is not finite.
        """
        heads = {"attn_q": self.get("llama.attention.head_count"), "attn_k": self.get("llama.attention.head_count_kv")}
        found: dict[str, Tensor] = {}
        for tensor in self._reader.tensors:
            *block, part, suffix = tensor.name.split(".")
            name = _NAMES.get(part)
            if name is None or suffix != "weight":
                raise WeightsError(f"{tensor.name}: no Llama has such a tensor; expected one of {', '.join(_NAMES)}")
            # a copy also of what is float32 already: that one is the mapped file, which may not be written to
            values = self._dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if part in heads:
                values = _half_split(values, heads[part])
            if not np.isfinite(values).all():
                raise WeightsError(f"{tensor.name}: NaN or infinite weights. Download the file again.")
            prefix = f"model.layers.{block[1]}." if block else ""
            found[f"{prefix}{name}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
        return found

    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json, with the pre-tokenizer that llama.cpp names "smollm": each digit alone, then GPT-2's rule."""
        tokens, kinds = self.get("tokenizer.ggml.tokens"), self.get("tokenizer.ggml.token_type")
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        special = [index for index, kind in enumerate(kinds) if kind == _CONTROL_TOKEN]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": index, "content": tokens[index], **plain} for index in special],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
            },
            "post_processor": None,
            "decoder": {**byte_level, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {token: index for index, token in enumerate(tokens)},
                "merges": self.get("tokenizer.ggml.merges"),
            },
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json, with the chat template."""
        tokens = self.get("tokenizer.ggml.tokens")
        roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {role: self.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
        return {
            **{f"{role}_token": tokens[index] for role, index in ids.items() if index is not None},
            "chat_template": self.get("tokenizer.chat_template"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.get("llama.context_length"),
            # not GPT2Tokenizer: Transformers 5 rebuilds that one's pre-tokenizer, and digits would stick together
            "tokenizer_class": "PreTrainedTokenizerFast",
        }

    def write(self, folder: Path) -> None:
        """Write a model folder: config, generation config, tokenizer and weights."""
        from safetensors.torch import save_file

        config = self.config()
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", ids)
        _write_json(folder / "tokenizer.json", self.tokenizer())
        _write_json(folder / "tokenizer_config.json", self.tokenizer_config())
        save_file(self.tensors(), folder / "model.safetensors", metadata={"format": "pt"})


def _half_split(weight: np.ndarray[Any, np.dtype[np.float32]], heads: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Undo the order of rows that llama.cpp gives to q and k.

    Both rotate pairs of rows: llama.cpp rows (2i, 2i+1) of a head, Transformers rows (i, i + half).
    """
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
