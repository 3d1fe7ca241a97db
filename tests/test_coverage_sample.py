"""About 70 model types, from their config to a variant that a process which never saw them loads with difference 0.0.

What is asserted is what `benchmarks.coverage` records: a type without any shortfall. Partial conversions (the first
block, the text tower) are saved and read too.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from versions import BEFORE_5

from benchmarks.records import RESULTS
from benchmarks.sweep.pool import CONVERTING, READING, Limits, Server, one
from benchmarks.sweep.sample import SAMPLE
from benchmarks.sweep.verdict import problems, reloads

NO_BLOCKS = {"resnet", "segformer", "mamba"}
"""ResNet and Mamba have none; a Segformer block has a depthwise convolution between its projections."""

IN_MEMORY = {"sam2_mask_decoder", "idefics_vision"}
"""Parts without a config of their own to save."""

ACCEPTED = {
    "sam2_mask_decoder": "the whole model was not run",  # takes embeddings that only the model around it makes
    # places that models of other types settle, in the whole sweep
    "seamless_m4t": "undecided: speech_encoder.encoder.layers.",
    "mistral3": "undecided: multi_modal_projector",
}
"""Shortfalls that are no fault, by how they begin."""


ON_4 = {
    "detr": "the zoo cannot make its backbone's config in transformers 4",
    "qwen2_vl": "the zoo cannot make its config small in transformers 4",
    "aria_text": "in transformers 4 its router asks for more experts than the zoo leaves it",
    "squeezebert": "in transformers 4 its block cannot be run alone, and its sites are not found",
}
"""What is not asserted on the oldest transformers, and why."""


@pytest.fixture(scope="module")
def servers():
    """One process that converts, one that reads; each type runs in a fork of its own."""
    pair = (
        Server("benchmarks.sweep.converting:convert", CONVERTING, Limits()),
        Server("benchmarks.sweep.reading:read", READING, Limits()),
    )
    for server in pair:
        server.wait_until_ready()
    yield pair
    for server in pair:
        server.close()


@pytest.mark.parametrize("model_type", [name for name in SAMPLE if name in CONFIG_MAPPING_NAMES])
def test_converted_saved_and_read_elsewhere(model_type, servers):
    if BEFORE_5 and model_type in ON_4:
        pytest.skip(ON_4[model_type])
    row = one(model_type, *servers, partial=True)
    found = [text for text in problems(row) if not text.startswith(ACCEPTED.get(model_type, "\0"))]
    assert not found, found
    if model_type in NO_BLOCKS:
        assert not row["sites"]
        return
    assert row["sites"]
    assert len(row["sites"]) == row["converted"] + row["kept"]
    if row["exact"]:
        assert row["max_rel"] is None or row["max_rel"] <= 1e-13
    if row["converted"] and model_type not in IN_MEMORY:
        assert reloads(row)
        ways = {read["way"] for read in row["reads"] if read["what"] == "all"}
        assert ways == {"plain"} if row["tier"] == "native" else "plugin" in ways


def test_no_stratum_is_left_out():
    """Of all strata in the record of the last sweep that three types pass or more, the sample has one."""
    path = Path(RESULTS / "coverage.json")
    if not path.exists():
        pytest.skip("no sweep is on record")
    strata = defaultdict(list)
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if row.get("converted") and not problems(row):
            for site in row["sites"]:
                strata[site["kind"], site["layout"], site["swappable"], row["tier"]].append(row["type"])
    missing = {
        stratum: sorted(set(types))[:5]
        for stratum, types in strata.items()
        if len(set(types)) > 2 and not set(types) & set(SAMPLE)
    }
    assert not missing
