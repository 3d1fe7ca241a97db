"""Converting a checkpoint that need not fit into memory."""

from hf_geglu.checkpoint.convert import ConvertedCheckpoint, convert_checkpoint
from hf_geglu.checkpoint.progress import bytes_bar

__all__ = ["ConvertedCheckpoint", "bytes_bar", "convert_checkpoint"]
