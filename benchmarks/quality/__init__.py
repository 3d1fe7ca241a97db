"""What conversions cost in quality, on real weights and real text of two domains.

    python -m benchmarks.quality                    # every part; hours on two cores
    python -m benchmarks.quality causal encoder     # some of them
    python -m benchmarks.quality page               # docs/quality.md from the parts that there are

Each part writes benchmarks/results/quality_PART.json, as it goes on.
"""
