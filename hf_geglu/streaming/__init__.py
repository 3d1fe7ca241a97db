"""Running a model of which only one layer's weights are in memory."""

from hf_geglu.streaming.nested import Nested
from hf_geglu.streaming.player import Player
from hf_geglu.streaming.residency import Read, Residency
from hf_geglu.streaming.tape import Tape
from hf_geglu.streaming.units import Unit, Units, divide

__all__ = ["Nested", "Player", "Read", "Residency", "Tape", "Unit", "Units", "divide"]
