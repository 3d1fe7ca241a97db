"""Which unit is this really? Answered by behaviour: names, sources and configs are not read."""

from hf_geglu.identifying.identify import identify
from hf_geglu.identifying.identity import Identity, Unknown

__all__ = ["Identity", "Unknown", "identify"]
