"""A small random model of any model type of transformers, and inputs for it.

    from benchmarks.zoo.building import build
    built = build("opt")            # built.model, built.shrinking, built.device

The sweep over all architectures and the tests use it; the package itself does not know it. Nothing is imported here:
`extras` must have its turn before transformers is imported.
"""
