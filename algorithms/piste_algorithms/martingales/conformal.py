"""A distribution-free shift detector: bets on conformal p-values that are valid given the calibration.

With `n` calibration scores, and `k = #{calibration scores >= s}`::

    p(s) = level_k,  level_j = the (1 - a_j) quantile of Beta(j + 1, n - j),  level_n = 1
    a_j proportional to 1 / (j + 1)^2,  sum_j a_j = false_alarm_rate / 2
    e_i = kappa_i p^(kappa_i - 1),  kappa in (0.3, 0.5, 0.7, 0.9)

The null probability that fewer than `j + 1` calibration scores are as large as a new one is Beta(j + 1, n -
j) over calibration samples. So with probability `1 - false_alarm_rate / 2` no level is too low, and given
that the `e_i` of all later events are independent e-values: the mixture of `shift_detector.py` has its rate.
The plain `(k + 1) / (n + 1)` is valid on average over calibration samples only, which is not enough for a
long stream against one of them.

Ties count as larger, so scores may be discrete. Sources: calibration-conditional p-values, Bates et al. (Ann.
Statist. 51, 2023, arXiv:2104.08279); the calibrators kappa p^(kappa - 1), Vovk and Wang (Ann. Statist. 49,
2021, arXiv:1912.06116).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from piste_algorithms._checks import check_range
from piste_algorithms.martingales import _kernel
from piste_algorithms.martingales.detector import Array, Detector, Scores, as_scores, check_choice
from piste_algorithms.martingales.shift_detector import log_ville_threshold

KAPPAS = (0.3, 0.5, 0.7, 0.9)


class ConformalDetector(Detector):
    """Raises an alarm when scores become larger, whatever their law; else with at most `false_alarm_rate`.

    Args:
        false_alarm_rate: the probability that a stream without a shift ever raises an alarm, in (0, 1); half
            of it is spent on the calibration.
        onset: `"harmonic"`, a mixture over unknown onsets, or `"plain"`, a bet on a shift at the very start.
        familywise: whether the rate is that of all segments between alarms together, as in `ShiftDetector`.
        smallest_p_value: calibration samples whose smallest possible p-value is larger are refused.
        non_finite: what a score that is NaN or infinite does, `"skip"` or `"raise"`.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        false_alarm_rate: float = 0.05,
        onset: str = "harmonic",
        *,
        familywise: bool = False,
        smallest_p_value: float = 0.02,
        non_finite: str = "skip",
    ) -> None:
        check_range("false_alarm_rate", false_alarm_rate, low=0.0, high=1.0, low_open=True)
        check_range("smallest_p_value", smallest_p_value, low=0.0, high=1.0, low_open=True)
        check_choice("onset", onset, ("harmonic", "plain"))
        super().__init__(
            {"false_alarm_rate": float(false_alarm_rate), "onset": onset, "familywise": bool(familywise)},
            _kernel.HARMONIC if onset == "harmonic" else _kernel.PLAIN,
            non_finite,
        )
        self.false_alarm_rate = float(false_alarm_rate)
        self.familywise = bool(familywise)
        self._smallest = float(smallest_p_value)
        self._reference: Array = np.empty(0)
        self._log_levels: Array = np.empty(0)

    @property
    def log_wealth(self) -> float:
        """The logarithm of M, 0 at the start and after an alarm.

        Raises:
            RuntimeError: if the detector is not calibrated.
        """
        return self._statistic()

    @property
    def calibration_points(self) -> int:
        """How many calibration scores are needed."""
        # level_0 = 1 - a_0^(1/n) <= smallest, with a_0 of an infinite sample, which is below that of a finite
        # one
        first = self.false_alarm_rate / 2 * 6 / math.pi**2
        return math.ceil(math.log(first) / math.log1p(-self._smallest))

    def calibrate(self, scores: Scores) -> None:
        """Learn the null law; the stream begins anew.

        Args:
            scores: `(n,)`, independent scores of the source.

        Raises:
            ValueError: if they are too few (the message says how many are needed), or are not finite where
            the
                policy is to raise.
        """
        values = as_scores("scores", scores, finite=self._non_finite == "raise")
        values = np.sort(values[np.isfinite(values)])
        if len(values) < self.calibration_points:
            raise ValueError(
                f"scores must hold at least {self.calibration_points} finite calibration points for this "
                f"level and p-values down to {self._smallest:g}, got {len(values)}"
            )
        self._set_reference(values)
        kappas = np.array(KAPPAS)
        # log e_i = (kappa_i - 1) log p + log kappa_i
        self._calibrated(kappas - 1, -np.log(kappas))

    def p_values(self, scores: Scores) -> Array:
        """The p-values of scores, `(events,)`; NaN where a score is not finite.

        Raises:
            ValueError: if `scores` is no vector of numbers.
            RuntimeError: if the detector is not calibrated.
        """
        self._statistic()  # calibrated
        return np.exp(self._evidence(as_scores("scores", scores, finite=False)))

    def _set_reference(self, values: Array) -> None:
        self._reference = values
        self._log_levels = np.log(calibration_levels(len(values), self.false_alarm_rate / 2))

    def _evidence(self, scores: Array) -> Array:
        # k = #{ calibration scores >= s };  log p = log level_k
        counts = len(self._reference) - np.searchsorted(self._reference, scores, side="left")
        evidence = np.asarray(self._log_levels[counts])
        evidence[~np.isfinite(scores)] = math.nan
        return evidence

    def _log_threshold(self, segment: int) -> float:
        return log_ville_threshold(self.false_alarm_rate, self.familywise, segment)

    def _calibration(self) -> dict[str, Any]:
        return {"reference": self._reference.tolist()}

    def _load_calibration(self, calibration: dict[str, Any]) -> None:
        self._set_reference(np.array(calibration["reference"], dtype=np.float64))


@functools.lru_cache(maxsize=64)
def calibration_levels(n: int, error: float) -> Array:
    """The p-value of each rank that is valid given the calibration sample.

    Args:
        n: number of calibration scores.
        error: the probability, over calibration samples, that any level is too low.

    Returns:
        `(n + 1,)`, for 0 to n calibration scores that are as large as the new one; read-only, as it is kept.
    """
    ranks = np.arange(n)
    # a_j = error (j + 1)^-2 / sum_i (i + 1)^-2
    weights = (ranks + 1.0) ** -2
    errors = error * weights / weights.sum()
    # level_j: P(Binomial(n, level) <= j) = a_j, which is the 1 - a_j quantile of Beta(j + 1, n - j)
    low, high = (ranks + 0.0) / n, np.ones(n)
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = _log_binomial_tail(n, ranks, middle) <= np.log(errors)
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    levels = np.append(np.maximum.accumulate(high), 1.0)
    levels.setflags(write=False)
    return levels


def _log_binomial_tail(n: int, ranks: Any, probabilities: Array) -> Array:
    """The logarithm of P(Binomial(n, p) <= j), elementwise, for p above j / n."""
    # Halving cannot make a probability exactly 1 before the last bits; there the tail is 0.
    p = np.minimum(probabilities, 1 - 1e-16)
    log_factorials = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
    log_largest = log_factorials[n] - log_factorials[ranks] - log_factorials[n - ranks]
    log_largest = log_largest + ranks * np.log(p) + (n - ranks) * np.log1p(-p)
    # P(k - 1) / P(k) = k (1 - p) / ((n - k + 1) p), below 1 from j downwards
    odds = (1 - p) / p
    term, total, k = np.ones(n), np.ones(n), ranks.astype(np.float64)
    while bool((term > 1e-17 * total).any()):
        term = term * np.maximum(k, 0.0) / (n - k + 1) * odds
        total += term
        k = k - 1
    return np.asarray(log_largest + np.log(total))
