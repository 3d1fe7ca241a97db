"""Files of a checkpoint, read with distrust and written so that they are there completely or not at all."""

from hf_geglu.files.folder import check_output, whole_folder
from hf_geglu.files.weights import check_weights

__all__ = ["check_output", "check_weights", "whole_folder"]
