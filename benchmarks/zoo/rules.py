"""Which number a field of a config becomes in a small model, told by the field's name.

A rule is (pattern, target); the first one that matches counts, and only numbers above the target change. The sizes are
chosen so that the parts of a model stay distinguishable: hidden 32, intermediate 64, vocabulary 160, two layers.
"""

from __future__ import annotations

import re

HIDDEN, INTERMEDIATE, LAYERS, HEADS, HEAD, VOCABULARY = 32, 64, 2, 4, 8, 160

_HEADS = re.compile(r"heads?$|_heads_|^n_head|head_count")
_RULES: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern), target)
    for pattern, target in (
        (r"vocab_size|^n_words$|vocab_sizes", VOCABULARY),
        (r"^(num|n)_(local_|routed_)?experts$|^moe_num_experts$|num_local_experts|n_routed_experts|^num_experts\b", 4),
        (r"^first_k_dense_replace$|^moe_layer_start_index$|^num_dense_layers$|^n_dense_layers$", 1),
        (r"^num_queries$", 8),
        (r"experts_per_tok|top_?k$|moe_k$|num_selected_experts", 2),
        (r"n_shared_experts|num_shared_experts", 1),
        (r"^n_group$|topk_group|num_expert_group", 1),
        (r"(key_value|kv)_heads?$|^num_kv|n_head_kv|num_global_key_value", 2),
        (_HEADS.pattern, HEADS),
        (
            r"head_dim$|^d_kv$|qk_nope_head|v_head|qk_rope_head|attention_key_size|dim_head|head_size|key_dim"
            r"|value_dim",
            HEAD,
        ),
        (r"q_lora_rank|kv_lora_rank|lora_rank", 16),
        (
            r"intermediate|ffn|feed_?forward|^d_ff|_ff$|n_inner|mlp_dim|mlp_hidden|inner_dim|ff_dim|ffw|d_inner",
            INTERMEDIATE,
        ),
        (
            r"hidden_size|d_model|n_embd|emb_dim|embed_dim|hidden_dim|^dim$|model_dim|embedding_size|^width$"
            r"|embedding_dim|proj(ection)?_(dim|size)|out_hidden|d_embed|attention_dim|decoder_hid|encoder_dim|_width$"
            r"|conv_dim$|output_dim|hidden_channels|cross_attention_hidden|num_channels_latent|ssm_|mamba_d_ssm"
            r"|query_dim|emb_size",
            HIDDEN,
        ),
        (r"(num|n)_?.*(layers?|blocks?|stages?)$|^n_layers?$|depth$|num_hidden_layers|layers$", LAYERS),
        (r"max_position_embeddings|^n_positions$|max_source_pos|max_target_pos|n_ctx|context_length", 128),
    )
)
_KEPT = re.compile(
    r"(_id|_ids|eps|dropout|prob|range|factor|ratio|theta|version|std|num_labels|patch|stride|kernel|dilation"
    r"|stages|num_stages|block_size|window|num_channels|out_features|out_indices)$"
)
"""Fields that say something else than a size, or whose value others must agree with."""

_DEPTH = re.compile(
    r"^(num|n)_?(hidden_|encoder_|decoder_)*layers?$|^(encoder|decoder)_layers$|^depth$|^n_layers?$"
    r"|num_local_experts|n_routed_experts|^num_experts$|^vocab_size$"
)
_TOKEN = re.compile(r"token.*(_id|_ids|_index|_idx)$")


def small_size(name: str, value: object, *, hidden: int, heads: bool) -> int | None:
    """The small number for a field; None where it stays.

    Args:
        name: of the field.
        value: what the field holds now.
        hidden: the hidden size to aim for.
        heads: whether the numbers of heads shrink too.
    """
    if isinstance(value, bool) or not isinstance(value, int) or _KEPT.search(name):
        return None
    for pattern, target in _RULES:
        if pattern.search(name):
            if target == HEADS and not heads and "head" in name:
                return None
            target = hidden if target == HIDDEN else target
            return target if value > target else None
    return None


def small_depth(name: str, value: object) -> int | None:
    """As `small_size`, for a model that keeps its widths and loses layers, experts and vocabulary only."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= LAYERS or not _DEPTH.search(name):
        return None
    target = VOCABULARY if "vocab" in name else 8 if "expert" in name else LAYERS
    return min(target, value)


def small_token(name: str, value: object) -> object | None:
    """A special token's id inside the small vocabulary, different ids staying different mostly; None where it stays."""
    if not _TOKEN.search(name) or isinstance(value, bool):
        return None
    if isinstance(value, int) and value >= VOCABULARY:
        return 3 + (sum(map(ord, name)) + value) % 150
    tokens = isinstance(value, list | tuple) and all(isinstance(token, int) for token in value)
    if isinstance(value, list | tuple) and tokens and max(value, default=0) >= VOCABULARY:
        return type(value)(3 + token % 150 for token in value)
    return None
