"""Saving and loading variants."""

from hf_geglu.files import check_output, whole_folder
from hf_geglu.hub.loading import from_pretrained, load, load_processor
from hf_geglu.hub.saving import save_folder

__all__ = ["check_output", "from_pretrained", "load", "load_processor", "save_folder", "whole_folder"]
