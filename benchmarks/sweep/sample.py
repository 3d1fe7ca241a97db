"""Model types that stand for all: every kind of block, layout and tier, and the families that people use most.

`tests/test_coverage_sample.py` converts, saves and reloads them, and holds that no stratum of the last sweep is left
out.
"""

# fmt: off
SAMPLE: tuple[str, ...] = (
    "bert", "gpt2", "llama", "t5", "clip", "vit",
    "whisper", "opt", "albert", "distilbert", "electra", "deberta-v2",
    "modernbert", "gpt_neo", "gpt_neox", "gptj", "bloom", "falcon",
    "mpt", "phi", "phi3", "mistral", "qwen3", "gemma2",
    "gemma3", "olmoe", "mt5", "bart", "m2m_100", "wav2vec2-conformer",
    "seamless_m4t", "speech_to_text", "deit", "dinov2", "swin", "convnext",
    "detr", "siglip", "blip", "fnet", "longformer", "funnel",
    "layoutlm", "vision-encoder-decoder", "encoder-decoder", "llava", "qwen2_vl", "gpt_bigcode",
    "codegen", "cohere", "nemotron", "moshi", "aria_text", "idefics_vision",
    "videomae", "segformer", "resnet", "mamba", "squeezebert", "data2vec-audio",
    "poolformer", "glm_image", "mistral3", "pop2piano", "modernvbert",
    "glm_ocr", "sam2_mask_decoder", "nemotron_h",
)
# fmt: on
