"""What GeGLU blocks and training steps cost, beside plain Transformers and beside their matrix products.

    python -m benchmarks.speed [--quick] [--only block step decode rest]     # results/speed.json, docs/performance.md

`__main__` starts one process for each measurement (`process`), with the same allocator settings for all sides, at one
thread and at two; `block`, `step`, `decode`, `generate` and `rest` measure; `clock` takes times, `memory` bytes;
`render` writes the page.
"""
