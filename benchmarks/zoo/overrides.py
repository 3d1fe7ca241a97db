"""What single model types must be told: their default config cannot be built, or is not consistent when small."""

from __future__ import annotations

from typing import Any

_FORECAST = {"prediction_length": 8}
_BACKBONE = {"use_timm_backbone": False, "backbone": None}
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}
_DETR = {**_BACKBONE, "backbone_config": _RESNET}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_TIMM_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 64, "patch_size": 16}
_FASTVIT = {
    "model_type": "timm_wrapper",
    "architecture": "fastvit_t8",
    "hidden_size": 384,
    "do_pooling": True,
    "global_pool": "avg",
    "model_args": {"inference_mode": True},
}
_VIBEVOICE = {"num_filters": 4, "depths": [1, 1, 1, 1, 1, 1, 1]}
_RATIOS = {"long": (7, 3), "mid": (5, 2), "short": (3, 1)}
_INTRACLASS = {
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{f"vertical_long_to_small_conv_{name}ratio": [[k, 1], 1, [p, 0]] for name, (k, p) in _RATIOS.items()},
        **{f"horizontal_small_to_long_conv_{name}ratio": [[1, k], 1, [0, p]] for name, (k, p) in _RATIOS.items()},
        **{f"symmetric_conv_long_{name}ratio": [k, 1, p] for name, (k, p) in _RATIOS.items()},
    }
}
_GEMMA4_ASSISTED = {
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}

_FOUR = {"num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
_NECK = {"neck_hidden_sizes": [16, 24, 32, 48]}
_DPT = {**_NECK, "backbone_config": {"model_type": "dinov2", "image_size": 56, "reshape_hidden_states": False, **_FOUR}}
_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
_PATCHES = {"model_type": "dinov2", "image_size": 56}

OVERRIDES: dict[str, dict[str, Any]] = {
    # as many stages as the neck has levels
    "depth_anything": _DPT,
    "prompt_depth_anything": _DPT,
    "tipsv2_dpt": {
        **_NECK,
        "backbone_config": {
            "model_type": "tipsv2_vision_model",
            "image_size": 56,
            "reshape_hidden_states": False,
            **_FOUR,
        },
    },
    "chmv2": {
        "post_process_channels": [16, 24, 32, 48],
        "backbone_config": {"model_type": "dinov3_vit", "image_size": 64, "return_class_token": True, **_FOUR},
    },
    "zoedepth": {
        **_NECK,
        "bottleneck_features": 32,
        "backbone_config": {"model_type": "beit", "image_size": 64, "reshape_hidden_states": False, **_FOUR},
    },
    "depth_pro": {
        "patch_size": 56,
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [16, 16],
        "scaled_images_feature_dims": [32, 32, 32],
        "merge_padding_value": 1,
        "image_model_config": _PATCHES,
        "patch_model_config": _PATCHES,
        "fov_model_config": _PATCHES,
    },
    "pvt": {"num_encoder_blocks": 4, "image_size": 64},
    "efficientnet": {"image_size": 64, "hidden_dim": 2560},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 4]},
    "lw_detr": {"projector_scale_factors": [1.0], "backbone_config": {"model_type": "lw_detr_vit", "image_size": 128}},
    "rf_detr": {"backbone_config": {"model_type": "rf_detr_dinov2", "image_size": 112}},
    "superglue": {
        "gnn_layers_types": ["self", "cross"],
        "keypoint_detector_config": {"model_type": "superpoint", "descriptor_decoder_dim": 32},
    },
    "autoformer": _FORECAST,
    "informer": _FORECAST,
    "time_series_transformer": _FORECAST,
    # head_dim is None by default, or is not hidden size / heads
    "ministral": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}},
    "voxtral_realtime_text": {"hidden_size": 64},  # wider than the 32 of its AdaRmsNorm, as real ones are
    "pp_ocrv5_server_det": {**_INTRACLASS, "scale_factor_list": [1, 2, 4, 8]},
    "pp_ocrv6_medium_det": {
        **_INTRACLASS,
        "scale_factor_list": [1, 2, 4, 8],
        "backbone_config": {"model_type": "hgnet_v2", **_STAGES},
    },
    "pp_ocrv6_small_det": {
        "layer_list_out_channels": [48, 96, 192, 384],
        "backbone_config": {
            "model_type": "pp_lcnet_v3",
            "scale": 0.75,
            "divisor": 16,
            "out_features": ["stage2", "stage3", "stage4", "stage5"],
        },
    },
    "nemotron": {"num_key_value_heads": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["full_attention", "full_attention"]},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] * 12},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 2, "activation_sparsity_pattern": None},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    # read by the model, not declared by the config
    "t5gemma2_text": {"dropout_rate": 0.0},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "qwen3_omni_moe_talker": {"spatial_merge_size": 2},
    # mappings that come with a tokenizer
    "chameleon": {"vocabulary_map": {"<image>": 8, "IMGIMGA": 20, "IMGIMGB": 21}},
    "emu3": {"vocabulary_map": {"<image>": 8, "<|extra_200|>": 9, "<|visual token 000000|>": 20}},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1],
    },
    "vitmatte": {"fusion_hidden_sizes": [32, 16, 8, 4]},
    "gemma4_assistant": {"text_config": _GEMMA4_ASSISTED},
    "gemma4_unified_assistant": {"text_config": _GEMMA4_ASSISTED | {"model_type": "gemma4_unified_text"}},
    # sizes that must agree: Mamba heads, rotary sections, groups of channels
    **{
        name: {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
        for name in ("glm4v_text", "glm_image_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_vl_text")
    },
    "qwen2_5_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "glm4v_moe_text": {
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
    },
    "swin": {"num_heads": [2, 4, 4, 8]},
    "nemotron_h": {"n_groups": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"qk_head_dim": 16},
    "sam2_hiera_det_model": {"hidden_size": 96, "image_size": [256, 256]},
    **{
        name: {"encoder_hidden_dim": 32, "decoder_in_channels": [32, 32, 32]}
        for name in (
            "rt_detr",
            "rt_detr_v2",
            "d_fine",
            "deimv2",
            "pp_doclayout_v2",
            "pp_doclayout_v3",
            "pp_doclayout_v4",
        )
    },
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "esmc": {"num_key_value_heads": 4},
    "cosmos3_edge_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "csm": {"codec_config": {"model_type": "mimi", "upsample_groups": 32}},
    "mimi": {"upsample_groups": 32, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1]},
    "blip-2": {"image_token_index": 20},
    "instructblip": {"image_token_index": 20},
    "instructblipvideo": {"video_token_index": 20},
    "granite_speech5_encoder": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "glm5_next_text": {"num_key_value_heads": 4, "index_topk": 16},
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2}},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "nemotron_h_omni": {"video_temporal_patch_size": None},
    "vibevoice_acoustic_tokenizer_encoder": _VIBEVOICE,
    "vibevoice_acoustic_tokenizer_decoder": _VIBEVOICE,
    "vibevoice_acoustic_tokenizer": _VIBEVOICE,
    "esmfold2": {"head_dim": 48},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
        "moe_num_experts": 4,
        "moe_intermediate_size": [24, 24],
    },
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1, 2, 2]},
    # timm's, small
    "timm_backbone": {"backbone": "resnet18", "use_pretrained_backbone": False},
    "timm_wrapper": {"architecture": "vit_tiny_patch16_224", "model_args": _TIMM_VIT},
    "gemma3n_vision": {"model_args": {"channel_multiplier": 0.125}},
    "fast_vlm": {"vision_config": _FASTVIT},
    # widths that must agree
    "bros": {"hidden_size": 64},
    "clap_audio_model": {"hidden_size": 64, "projection_dim": 32},
    "clap": {"audio_config": {"model_type": "clap_audio_model", "hidden_size": 64}},
    "clvp_encoder": {"hidden_size": 64, "projection_dim": 64, "num_attention_heads": 2},
    "univnet": {"kernel_predictor_hidden_channels": 64},
    "neucodec": {"quantization_dim": 64, "num_key_value_heads": 4},
    "xcodec2": {"quantization_dim": 64, "num_key_value_heads": 4},
    "align": {"projection_dim": 640},
    "qwen2_5_omni_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "qwen2_5_omni_talker": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "shieldgemma2": {"yes_token_index": 10, "no_token_index": 11},
    "step3p5": {"sliding_window": 8},
    "oneformer": {"conv_dim": 256, "mask_dim": 256, "hidden_dim": 256},
    "sam_hq": {
        "vision_config": {
            "model_type": "sam_hq_vision_model",
            "output_channels": 32,
            "num_pos_feats": 16,
            "image_size": 64,
        },
        "prompt_encoder_config": {"image_size": 64},
    },
    "sam": {
        "vision_config": {
            "model_type": "sam_vision_model",
            "output_channels": 32,
            "num_pos_feats": 16,
            "image_size": 64,
        },
        "prompt_encoder_config": {"image_size": 64},
    },
    "janus_vqgan": {"num_patches": 4},
    # pictures that need not be large
    **{
        name: {"image_size": 64}
        for name in (
            "align_vision_model",
            "bridgetower_vision_model",
            "convnext",
            "convnextv2",
            "dinov3_convnext",
            "eomt",
            "eomt_dinov3",
        )
    },
    # a backbone without timm
    "detr": _DETR,
    "conditional_detr": _DETR,
    "deformable_detr": _DETR,
    "dab-detr": _DETR,
    "table-transformer": _DETR,
    "omdet-turbo": {
        **_BACKBONE,
        "apply_layernorm_after_vision_backbone": False,
        "text_projection_in_dim": 48,
        "text_config": {"model_type": "clip_text_model", "hidden_size": 48},
        "text_projection_out_dim": 48,
        "class_embed_dim": 48,
        "vision_features_channels": [32, 32, 32],
        "backbone_config": {"model_type": "swin", "out_features": ["stage2", "stage3", "stage4"], "image_size": 224},
        "encoder_in_channels": [64, 128, 256],
    },
}
"""Model type -> keys of its config, wherever in a nested config that type appears."""

COMPOSED: dict[str, tuple[str, str, str]] = {
    "encoder-decoder": ("from_encoder_decoder_configs", "bert", "bert"),
    "speech-encoder-decoder": ("from_encoder_decoder_configs", "wav2vec2", "bert"),
    "vision-encoder-decoder": ("from_encoder_decoder_configs", "vit", "bert"),
    "vision-text-dual-encoder": ("from_vision_text_configs", "vit", "bert"),
}
"""Types that are put together from two others: the config's class method and the two types."""

CLASSES: dict[str, str] = {
    # what AutoModel names reads another config, or the model is another type's
    "idefics_vision": "models.idefics.vision.IdeficsVisionTransformer",
    "nougat": "models.vision_encoder_decoder.modeling_vision_encoder_decoder.VisionEncoderDecoderModel",
    "pp_chart2table": "models.got_ocr2.modeling_got_ocr2.GotOcr2Model",
    "vibevoice_diffusion": "models.vibevoice.modeling_vibevoice.VibeVoiceDiffusionHead",
}
"""Model type -> its class below `transformers`, where no rule of `classes` tells."""

NOT_BUILT: dict[str, str] = {
    "idefics_perciever": "its module takes sizes of the model around it; it is built as part of idefics",
    "pp_chart2table_vision": "its tower is GOT-OCR2's; it is built as part of pp_chart2table",
    "sapiens2_head": "no model of its own; it is built as part of sapiens2",
    "gemma4_unified_audio": "no model of its own; it is built as part of gemma4_unified",
    "gemma4_unified_vision": "its module takes the config of the text model too; it is built as part of gemma4_unified",
    "t5_gemma_module": "the config of T5Gemma's two stacks, no model; they are built as part of t5gemma",
}
"""Model types without a model of their own."""
