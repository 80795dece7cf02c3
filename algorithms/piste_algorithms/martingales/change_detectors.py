"""CUSUM and Shiryaev-Roberts over bets, which promise a mean time to a false alarm, not a probability.

With `e_j` as in `shift_detector.py`::

    Shiryaev-Roberts   R_j <- (1 + R_j) e_j            alarm where mean_j R_j >= average_run_length
    CUSUM              C_j <- max(C_j, 1) e_j          alarm where mean_j C_j >= average_run_length

While nothing shifts, `mean_j R_j - t` is a supermartingale, so the mean time to an alarm is at least the
threshold; `C_j` is at most `R_j`. Neither loses power with the time before a shift, as an e-process must.

Sources: Page (Biometrika 41, 1954); Roberts (Technometrics 8, 1966); for e-values in place of likelihood
ratios Shin, Ramdas and Rinaldo (arXiv:2203.03532).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from piste_algorithms._checks import check_range
from piste_algorithms.martingales import _kernel
from piste_algorithms.martingales.shift_detector import BETS, ScoreDetector


class RunLengthDetector(ScoreDetector):
    """A detector whose false alarms are at least `average_run_length` events apart in the mean.

    Args:
        average_run_length: the least mean number of events to a false alarm, at least 1.
        bound: see `ShiftDetector`, as are the rest.
        calibration_error: how often the calibration may fail, in (0, 1).
        two_sided: see `ShiftDetector`.
        bets: see `ShiftDetector`.
        clip: see `ShiftDetector`.
        smallest_shift: see `ShiftDetector`.
        resamples: see `ShiftDetector`.
        seed: see `ShiftDetector`.
        non_finite: see `ShiftDetector`.

    Raises:
        ValueError: if an argument is outside its range.
    """

    rule: ClassVar[int]

    def __init__(
        self,
        average_run_length: float = 10_000.0,
        bound: str = "wsr",
        calibration_error: float = 0.025,
        two_sided: bool = False,
        *,
        bets: Sequence[float] = BETS,
        clip: float = 4.0,
        smallest_shift: float = 0.25,
        resamples: int = 200,
        seed: int = 0,
        non_finite: str = "skip",
    ) -> None:
        check_range("average_run_length", average_run_length, low=1.0)
        check_range("calibration_error", calibration_error, low=0.0, high=1.0, low_open=True)
        super().__init__(
            {"average_run_length": float(average_run_length), "calibration_error": float(calibration_error)},
            self.rule,
            non_finite,
            bound=bound,
            error=calibration_error,
            two_sided=two_sided,
            bets=bets,
            clip=clip,
            smallest_shift=smallest_shift,
            resamples=resamples,
            seed=seed,
        )
        self.average_run_length = float(average_run_length)

    @property
    def log_statistic(self) -> float:
        """The logarithm of the statistic, minus infinity at the start and after an alarm.

        Raises:
            RuntimeError: if the detector is not calibrated.
        """
        return self._statistic()

    def _log_threshold(self, segment: int) -> float:
        return math.log(self.average_run_length)


class Cusum(RunLengthDetector):
    """CUSUM over bets, with the arguments of `RunLengthDetector`."""

    rule = _kernel.RESTARTED_MAX


class ShiryaevRoberts(RunLengthDetector):
    """Shiryaev-Roberts over bets, with the arguments of `RunLengthDetector`."""

    rule = _kernel.RESTARTED_SUM
