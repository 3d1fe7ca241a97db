"""Every setting of a run as frozen dataclasses, with the words of the command line."""
