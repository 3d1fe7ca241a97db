"""Importing this makes the extra packages importable: for processes that are told which modules to import."""

from benchmarks.zoo.extras import use_extras

use_extras()
