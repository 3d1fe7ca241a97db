"""Model types that stand for all: for every stratum of blocks (kind, layout, activation, where it lives, tier) at least
one. `tests/test_coverage_sample.py` holds that against the record of the last sweep."""

SAMPLE: tuple[str, ...] = ("bert", "gpt2", "llama", "t5", "clip", "mixtral", "esm", "vit", "whisper", "opt")
