"""The finder on real architectures: what is expected is written by hand, architecture by architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import TINY, D, F, tiny
from transformers import AutoModel, AutoModelForSequenceClassification, GPT2Config, GPT2Model
from versions import BEFORE_5

from hf_geglu.sites import FoundSites, Site, find_sites

LAID_OUT_OTHERWISE_BEFORE_5 = {"vit", "deit", "dinov2", "swin", "clip_vision_model", "detr", "mixtral"}


def _skip_other_layouts(model_type: str) -> None:
    if BEFORE_5 and model_type in LAID_OUT_OTHERWISE_BEFORE_5:
        pytest.skip("what is expected is written for the modules of transformers 5")


# model type -> (sites, kind, layout, activation, gate half,
#                first block, its gate, up and down relative to it, its activation attribute relative to it)
EXPECTED = {
    "bert": (
        (2, "split", "dense", "gelu", None),
        ("bert.encoder.layer.0", "intermediate.dense", "intermediate.dense", "output.dense"),
        "intermediate.intermediate_act_fn",
    ),
    "roberta": (
        (2, "split", "dense", "gelu", None),
        ("roberta.encoder.layer.0", "intermediate.dense", "intermediate.dense", "output.dense"),
        "intermediate.intermediate_act_fn",
    ),
    "electra": (
        (2, "split", "dense", "gelu", None),
        ("electra.encoder.layer.0", "intermediate.dense", "intermediate.dense", "output.dense"),
        "intermediate.intermediate_act_fn",
    ),
    "deberta-v2": (
        (2, "split", "dense", "gelu", None),
        ("deberta.encoder.layer.0", "intermediate.dense", "intermediate.dense", "output.dense"),
        "intermediate.intermediate_act_fn",
    ),
    "esm": (
        (2, "split", "dense", "gelu", None),
        ("esm.encoder.layer.0", "intermediate.dense", "intermediate.dense", "output.dense"),
        "intermediate.gate_activation",
    ),
    "distilbert": (
        (2, "module", "dense", "gelu", None),
        ("distilbert.transformer.layer.0.ffn", "lin1", "lin1", "lin2"),
        "activation",
    ),
    "albert": (
        (1, "inline", "dense", "gelu_pytorch_tanh", None),
        ("albert.encoder.albert_layer_groups.0.albert_layers.0", "ffn", "ffn", "ffn_output"),
        "activation",
    ),
    "modernbert": ((2, "module", "packed", "gelu", "first"), ("model.layers.0.mlp", "Wi", "Wi", "Wo"), "act"),
    "gpt2": (
        (2, "module", "dense", "gelu_pytorch_tanh", None),
        ("transformer.h.0.mlp", "c_fc", "c_fc", "c_proj"),
        "act",
    ),
    "gpt_bigcode": (
        (2, "module", "dense", "gelu_pytorch_tanh", None),
        ("transformer.h.0.mlp", "c_fc", "c_fc", "c_proj"),
        "act",
    ),
    "gpt_neo": (
        (2, "module", "dense", "gelu_pytorch_tanh", None),
        ("transformer.h.0.mlp", "c_fc", "c_fc", "c_proj"),
        "act",
    ),
    "gpt_neox": (
        (2, "module", "dense", "gelu", None),
        ("gpt_neox.layers.0.mlp", "dense_h_to_4h", "dense_h_to_4h", "dense_4h_to_h"),
        "act",
    ),
    "gptj": (
        (2, "module", "dense", "gelu_pytorch_tanh", None),
        ("transformer.h.0.mlp", "fc_in", "fc_in", "fc_out"),
        "act",
    ),
    "codegen": (
        (2, "module", "dense", "gelu_pytorch_tanh", None),
        ("transformer.h.0.mlp", "fc_in", "fc_in", "fc_out"),
        "act",
    ),
    "phi": (
        (2, "module", "dense", "gelu_pytorch_tanh", None),
        ("model.layers.0.mlp", "fc1", "fc1", "fc2"),
        "activation_fn",
    ),
    "falcon": (
        (2, "module", "dense", "gelu", None),
        ("transformer.h.0.mlp", "dense_h_to_4h", "dense_h_to_4h", "dense_4h_to_h"),
        "act",
    ),
    "bloom": (
        (2, "module", "dense", "gelu_pytorch_tanh", None),
        ("transformer.h.0.mlp", "dense_h_to_4h", "dense_h_to_4h", "dense_4h_to_h"),
        "gelu_impl",
    ),
    "mpt": (
        (2, "module", "dense", "gelu", None),
        ("transformer.blocks.0.ffn", "up_proj", "up_proj", "down_proj"),
        "act",
    ),
    "opt": (
        (2, "inline", "dense", "relu", None),
        ("model.decoder.layers.0", "fc1", "fc1", "fc2"),
        "activation_fn",
    ),
    **{
        name: (
            (2, "module", "separate", activation, None),
            ("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj"),
            "act_fn",
        )
        for name, activation in {
            "llama": "silu",
            "mistral": "silu",
            "qwen2": "silu",
            "qwen3": "silu",
            "gemma": "gelu_pytorch_tanh",
            "gemma2": "gelu_pytorch_tanh",
        }.items()
    },
    "phi3": (
        (2, "module", "packed", "silu", "first"),
        ("model.layers.0.mlp", "gate_up_proj", "gate_up_proj", "down_proj"),
        "activation_fn",
    ),
    "t5": (
        (4, "module", "dense", "relu", None),
        ("encoder.block.0.layer.1.DenseReluDense", "wi", "wi", "wo"),
        "act",
    ),
    "mt5": (
        (4, "module", "separate", "gelu_pytorch_tanh", None),
        ("encoder.block.0.layer.1.DenseReluDense", "wi_0", "wi_1", "wo"),
        "act",
    ),
    **{
        name: (
            (4, "inline", "dense", activation, None),
            ("model.encoder.layers.0", "fc1", "fc1", "fc2"),
            "activation_fn",
        )
        for name, activation in {
            "bart": "gelu",
            "pegasus": "gelu",
            "blenderbot": "gelu",
            "whisper": "gelu",
            "m2m_100": "relu",
            "speech_to_text": "relu",
        }.items()
    },
    "wav2vec2": (
        (2, "module", "dense", "gelu", None),
        ("encoder.layers.0.feed_forward", "intermediate_dense", "intermediate_dense", "output_dense"),
        "intermediate_act_fn",
    ),
    "wav2vec2-conformer": (
        (4, "module", "dense", "gelu", None),
        ("encoder.layers.0.ffn1", "intermediate_dense", "intermediate_dense", "output_dense"),
        "intermediate_act_fn",
    ),
    "vit": ((2, "module", "dense", "gelu", None), ("vit.layers.0.mlp", "fc1", "fc1", "fc2"), "activation_fn"),
    "deit": ((2, "module", "dense", "gelu", None), ("layers.0.mlp", "fc1", "fc1", "fc2"), "activation_fn"),
    "dinov2": ((2, "module", "dense", "gelu", None), ("encoder.layer.0.mlp", "fc1", "fc1", "fc2"), "activation_fn"),
    "swin": (
        (2, "module", "dense", "gelu", None),
        ("swin.encoder.layers.0.blocks.0.mlp", "fc1", "fc1", "fc2"),
        "activation_fn",
    ),
    "convnext": (
        (2, "inline", "dense", "gelu", None),
        ("encoder.stages.0.layers.0", "pwconv1", "pwconv1", "pwconv2"),
        "act",
    ),
    "detr": ((4, "module", "dense", "relu", None), ("encoder.layers.0.mlp", "fc1", "fc1", "fc2"), "activation_fn"),
    "clip_vision_model": (
        (2, "module", "dense", "quick_gelu", None),
        ("encoder.layers.0.mlp", "fc1", "fc1", "fc2"),
        "activation_fn",
    ),
    "clip": (
        (4, "module", "dense", "quick_gelu", None),
        ("text_model.encoder.layers.0.mlp", "fc1", "fc1", "fc2"),
        "activation_fn",
    ),
    "siglip": (
        (5, "module", "dense", "gelu_pytorch_tanh", None),
        ("text_model.encoder.layers.0.mlp", "fc1", "fc1", "fc2"),
        "activation_fn",
    ),
    "mixtral": ((2, "experts", "packed", "silu", "first"), None, None),
    "mobilenet_v2": ((0, None, None, None, None), None, None),
}

WIDTHS = {"bloom": 4 * D, "mpt": 4 * D, "dinov2": 3 * D, "swin": 4 * D, "convnext": 4 * D}
"""Where the width follows from the hidden size; F everywhere else."""


def test_every_tiny_model_has_an_expectation() -> None:
    assert set(EXPECTED) == set(TINY)


@pytest.mark.parametrize("model_type", sorted(EXPECTED))
def test_sites_of_an_architecture(model_type: str) -> None:
    _skip_other_layouts(model_type)
    (count, *words), paths, activation = EXPECTED[model_type]
    model = tiny(model_type)

    found = find_sites(model)

    assert len(found) == count
    for site in found:
        assert [site.kind, site.layout, site.activation, site.gate_half] == words
    if paths is None:
        return
    first = found.sites[0]
    block = paths[0]
    assert (first.block, first.gate, first.up, first.down) == (block, *(f"{block}.{path}" for path in paths[1:]))
    assert first.activation_path == (None if activation is None else f"{block}.{activation}")
    assert (first.d_in, first.width, first.d_out) == (D, WIDTHS.get(model_type, F), D)
    assert first.projection == ("conv1d" if model_type == "gpt2" else "linear")
    assert first.value_offset == 0.0
    for site in found:
        model.get_submodule(site.block)
        assert model.get_submodule(site.up).weight.numel() == site.d_in * site.width * (
            2 if words[1] == "packed" else 1
        )


def test_sites_come_in_the_order_of_the_model() -> None:
    ups = [site.up for site in find_sites(tiny("bart"))]
    assert ups == [f"model.{part}.layers.{i}.fc1" for part in ("encoder", "decoder") for i in (0, 1)]


@pytest.mark.parametrize(
    ("model_type", "overrides", "layout", "activation"),
    [
        ("bert", {"hidden_act": "gelu_new"}, "dense", "gelu_pytorch_tanh"),
        ("bert", {"hidden_act": "gelu_python"}, "dense", "gelu"),
        ("bert", {"hidden_act": "gelu_fast"}, "dense", "gelu_pytorch_tanh"),
        ("bert", {"hidden_act": "swish"}, "dense", "silu"),
        ("bert", {"hidden_act": "relu2"}, "dense", "relu2"),
        ("bert", {"hidden_act": "gelu_10"}, "dense", "gelu_10"),
        ("bert", {"hidden_act": "mish"}, "dense", "mish"),
        ("bert", {"chunk_size_feed_forward": 2}, "dense", "gelu"),
        ("llama", {"hidden_act": "gelu"}, "separate", "gelu"),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "separate", "gelu_pytorch_tanh"),
        ("llama", {"hidden_act": "sigmoid"}, "separate", "sigmoid"),
        ("llama", {"hidden_act": "linear"}, "separate", "linear"),
        ("llama", {"hidden_act": "relu"}, "separate", "relu"),
        ("t5", {"feed_forward_proj": "gated-gelu"}, "separate", "gelu_pytorch_tanh"),
        ("t5", {"feed_forward_proj": "gated-silu"}, "separate", "silu"),
        ("phi3", {"hidden_act": "gelu"}, "packed", "gelu"),
        ("dinov2", {"use_swiglu_ffn": True}, "separate", "silu"),
    ],
)
def test_the_exact_activation_is_named(
    model_type: str, overrides: dict[str, object], layout: str, activation: str
) -> None:
    _skip_other_layouts(model_type)
    found = find_sites(tiny(model_type, **overrides))
    assert {(site.layout, site.activation) for site in found} == {(layout, activation)}
    assert len(found) == (4 if model_type == "t5" else 2)


def test_layers_of_one_class_may_differ() -> None:
    model = tiny("bert")
    del model.bert.encoder.layer[1].intermediate.intermediate_act_fn
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.functional.silu
    first, second = find_sites(model)
    assert (first.activation, second.activation) == ("gelu", "silu")
    assert second.activation_path == "bert.encoder.layer.1.intermediate.intermediate_act_fn"


@pytest.mark.parametrize(
    ("model_type", "auto", "path", "words"),
    [
        ("bert", AutoModel, "pooler", ("one projection", "tanh")),
        ("bert", None, "cls.predictions", ("decoder", "transform.dense")),
        ("roberta", AutoModelForSequenceClassification, "classifier", ("d_in != d_out",)),
        ("distilbert", AutoModelForSequenceClassification, "", ("pre_classifier", "classifier")),
        ("deit", None, "pooler", ("one projection", "tanh")),
        ("wav2vec2-conformer", None, "encoder.layers.0.conv_module", ("convolution wider than 1",)),
        ("mobilenet_v2", None, "layer.3", ("convolution wider than 1",)),
    ],
)
def test_what_is_not_taken_says_why(model_type: str, auto: type | None, path: str, words: tuple[str, ...]) -> None:
    _skip_other_layouts(model_type)
    rejected = {rejection.path: rejection for rejection in find_sites(tiny(model_type, auto=auto)).rejected}
    assert path in rejected
    for word in words:
        assert word in rejected[path].reason


def test_rejections_name_the_class() -> None:
    model = tiny("bert")
    for rejection in find_sites(model).rejected:
        assert type(model.get_submodule(rejection.path)).__name__ == rejection.class_name


def in_float32(model_type: str) -> FoundSites:
    return find_sites(tiny(model_type))


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "opt", "llama", "modernbert", "t5", "esm", "convnext", "bloom"])
def test_dtype_device_and_mode_do_not_matter(model_type: str) -> None:
    expected = in_float32(model_type)
    assert find_sites(tiny(model_type).to(torch.bfloat16)) == expected
    assert find_sites(tiny(model_type).half().train()) == expected
    with torch.device("meta"):
        assert find_sites(tiny(model_type)) == expected
    with torch.inference_mode():
        assert find_sites(tiny(model_type)) == expected


def test_a_full_size_model_costs_no_memory_worth_mention() -> None:
    with torch.device("meta"):
        model = GPT2Model(GPT2Config())
    found = find_sites(model)
    assert len(found) == 12
    assert {(site.d_in, site.width) for site in found} == {(768, 3072)}


def test_layer_and_gated_follow_from_a_site() -> None:
    site: Site = find_sites(tiny("bart")).sites[3]
    assert site.layer == 1
    assert not site.gated
    assert replace(site, layout="packed").gated
