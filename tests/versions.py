"""Which transformers runs the tests: the newest, or the floor that pyproject promises."""

import transformers
from packaging.version import Version

BEFORE_5 = Version(transformers.__version__) < Version("5")
"""transformers 4 lays some classes out otherwise (ViT's FFN is split over two modules, Mixtral's experts are a list),
and some of its models do not run in float64."""
