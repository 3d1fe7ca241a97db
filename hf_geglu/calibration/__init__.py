"""Calibration: what passes the FFN blocks of a model on real data, and conversions that are fitted to it."""

from hf_geglu.calibration.budget import Measured, measure
from hf_geglu.calibration.calibrate import Calibrated, calibrate
from hf_geglu.calibration.data import CalibrationData
from hf_geglu.calibration.gather import Progress, Statistic, gather
from hf_geglu.calibration.seen import Seen

__all__ = [
    "Calibrated",
    "CalibrationData",
    "Measured",
    "Progress",
    "Seen",
    "Statistic",
    "calibrate",
    "gather",
    "measure",
]
