"""Saving and loading variants."""

from hf_geglu.hub.loading import from_pretrained, load, load_processor
from hf_geglu.hub.saving import check_output, save_folder, whole_folder

__all__ = ["check_output", "from_pretrained", "load", "load_processor", "save_folder", "whole_folder"]
