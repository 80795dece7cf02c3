"""Test martingales and e-processes: shifts found with a false-alarm rate that holds at any time.

Detectors work on numbers and import no torch, whose import takes longer than a killed detector may be away;
`FisherScore` does, when it is asked for.
"""

from typing import TYPE_CHECKING, Any

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
from piste_algorithms.martingales.shift_detector import ShiftDetector

if TYPE_CHECKING:
    from piste_algorithms.martingales.scores import FisherScore

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


def __getattr__(name: str) -> Any:
    if name == "FisherScore":
        from piste_algorithms.martingales.scores import FisherScore

        return FisherScore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
