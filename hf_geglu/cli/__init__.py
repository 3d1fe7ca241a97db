"""The command line: parse, call, print."""

from hf_geglu.cli.app import main

__all__ = ["main"]
