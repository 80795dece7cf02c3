"""Test martingales and e-processes: shifts found with a false-alarm rate that holds at any time."""

from piste_algorithms.martingales.change_detectors import Cusum, ShiryaevRoberts
from piste_algorithms.martingales.conformal import ConformalDetector
from piste_algorithms.martingales.delay import expected_delay
from piste_algorithms.martingales.detector import Alarm
from piste_algorithms.martingales.p_values import (
    PluginMartingale,
    PowerMartingale,
    PowerMixture,
    SimpleJumper,
)
from piste_algorithms.martingales.scores import FisherScore
from piste_algorithms.martingales.shift_detector import ShiftDetector

__all__ = [
    "Alarm",
    "ConformalDetector",
    "Cusum",
    "FisherScore",
    "PluginMartingale",
    "PowerMartingale",
    "PowerMixture",
    "ShiftDetector",
    "ShiryaevRoberts",
    "SimpleJumper",
    "expected_delay",
]
