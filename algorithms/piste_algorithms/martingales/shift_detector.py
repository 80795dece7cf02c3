"""Detection of a shift of scores with a false-alarm rate that holds at any time, over the whole stream.

With calibration scores of the source, the first half of them standardising, the second half bounding::

    z     = clip((s - mean) / sd, -B, B)                 bounded, so that every moment exists
    psi_j = log U_j                                      U_j: upper bound of E0[exp(lambda_j z)] (`bounds.py`)
    e_j   = exp(lambda_j z - psi_j)                      E0[e_j] <= 1
    plain     M = mean_j prod_t e_j
    harmonic  M = mean_j sum_s e_j(s) ... e_j(t) / (s (s + 1)) + 1 / (t + 1)
                                                         a mixture over the unknown onset s
    alarm where M >= 2 / false_alarm_rate

Half of the rate is spent on the bounds, half on Ville's inequality, P(M ever reaches c) <= 1 / c. `plain` has
lost its wealth by the time of a late shift; `harmonic` pays about log(t (t + 1)) for not having lost it.

The guarantee asks for independent scores of one law while nothing shifts, finite ones if scores that are not
finite are skipped. Dependent scores should be thinned, or averaged over blocks, on both sides of the
calibration.

Sources: the exponential martingale of scores, the bound by resampling and Ville's threshold are those
published as M-FISHER; the mixture over onsets is that of e-detectors (Shin, Ramdas, Rinaldo,
arXiv:2203.03532), with weights that sum to one. The published bootstrap bound has its level in the limit of
many calibration points only, so the default here is a bound that holds for any number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from piste_algorithms._checks import check_integer, check_range
from piste_algorithms.martingales import _kernel
from piste_algorithms.martingales.bounds import BOUNDS, log_moment_bounds
from piste_algorithms.martingales.detector import Array, Detector, Scores, as_scores, check_choice

BETS = (0.1, 0.25, 0.5, 1.0)


class ScoreDetector(Detector):
    """A detector that bets on standardised, clipped scores.

    Args:
        settings: see `Detector`.
        recursion: see `Detector`.
        non_finite: see `Detector`.
        bound: one of `BOUNDS`.
        error: how often the calibration may fail, in (0, 1).
        two_sided: bet on smaller scores too.
        bets: lambda, each in (0, 10].
        clip: B, in standard deviations.
        smallest_shift: the calibration sample must be large enough for shifts down to this size, in standard
            deviations, to be worth a bet; smaller samples are refused.
        resamples: number of resampled means of the bound `bootstrap`.
        seed: of the generator that draws them.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        recursion: int,
        non_finite: str,
        *,
        bound: str,
        error: float,
        two_sided: bool,
        bets: Sequence[float],
        clip: float,
        smallest_shift: float,
        resamples: int,
        seed: int,
    ) -> None:
        check_choice("bound", bound, BOUNDS)
        if not isinstance(bets, Sequence) or not bets:
            raise ValueError(f"bets must be a sequence of numbers in (0, 10], got {bets!r}")
        for index, bet in enumerate(bets):
            check_range(f"bets[{index}]", bet, low=0.0, high=math.nextafter(10.0, 11.0), low_open=True)
        check_range("clip", clip, low=0.0, high=100.0, low_open=True)
        check_range("smallest_shift", smallest_shift, low=0.0, low_open=True)
        check_integer("resamples", resamples, low=1)
        check_integer("seed", seed, low=0)
        if not isinstance(two_sided, bool):
            raise ValueError(f"two_sided must be True or False, got {two_sided!r}")
        drawn = {"resamples": resamples, "seed": seed} if bound == "bootstrap" else {}
        settings = {
            **settings,
            "bound": bound,
            "two_sided": two_sided,
            "bets": [float(bet) for bet in bets],
            "clip": float(clip),
            **drawn,
        }
        super().__init__(settings, recursion, non_finite)
        self.bound = bound
        self._error = error
        self._signed_bets = np.array(
            [*bets, *(-bet for bet in bets)] if two_sided else bets, dtype=np.float64
        )
        self._clip = float(clip)
        self._smallest_shift = float(smallest_shift)
        self._resamples = resamples
        self._seed = seed
        self._mean = self._scale = math.nan
        fewest = math.ceil(len(self._signed_bets) / error)
        if bound == "bootstrap" and resamples < fewest:
            raise ValueError(
                f"resamples must be at least {fewest} for a bootstrap quantile at this level, got {resamples}"
            )

    @property
    def calibration_points(self) -> int:
        """How many calibration scores are needed."""
        # A shift of D standard deviations gains lambda D a unit of log-wealth and loses the margin of psi,
        # about lambda sqrt(2 log(1/a) / n), with a the share of the error of one bet: n > 2 log(1/a) / D^2,
        # twice.
        share = self._error / len(self._signed_bets)
        return 2 * math.ceil(2 * math.log(1 / share) / self._smallest_shift**2)

    def calibrate(self, scores: Scores) -> None:
        """Learn the null law; the stream begins anew.

        Args:
            scores: `(n,)`, independent scores of the source: the first half standardises, the second half
                bounds.

        Raises:
            ValueError: if they are too few (the message says how many are needed), or do not vary, or are not
                finite where the policy is to raise.
        """
        values = as_scores("scores", scores, finite=self._non_finite == "raise")
        values = values[np.isfinite(values)]
        if len(values) < self.calibration_points:
            raise ValueError(
                f"scores must hold at least {self.calibration_points} finite calibration points for this "
                f"level and shifts of {self._smallest_shift:g} standard deviations, got {len(values)}"
            )
        half = len(values) // 2
        mean, scale = float(values[:half].mean()), float(values[:half].std())
        if not (scale > 0.0 and math.isfinite(scale) and math.isfinite(mean)):
            raise ValueError(
                f"scores must vary within float64's range, got a standard deviation of {scale:g}"
            )
        self._mean, self._scale = mean, scale
        log_bounds = log_moment_bounds(
            self._evidence(values[half:]),
            self._signed_bets,
            self._clip,
            self.bound,
            self._error,
            self._resamples,
            np.random.default_rng(self._seed),
        )
        self._calibrated(self._signed_bets, log_bounds)

    def _evidence(self, scores: Array) -> Array:
        # z = clip((s - mean) / sd, -B, B)
        standardised = (scores - self._mean) / self._scale
        clipped = np.clip(standardised, -self._clip, self._clip)
        clipped[~np.isfinite(scores)] = math.nan
        return clipped

    def _calibration(self) -> dict[str, Any]:
        return {"mean": self._mean, "scale": self._scale}

    def _load_calibration(self, calibration: dict[str, Any]) -> None:
        self._mean, self._scale = calibration["mean"], calibration["scale"]


class ShiftDetector(ScoreDetector):
    """Raises an alarm when scores shift; while they do not, it ever does with at most `false_alarm_rate`.

    After an alarm the wealth is one again. The rate then holds from each start to the next alarm; with
    `familywise` it holds for all of them together, the k-th segment at the rate `false_alarm_rate / (k (k +
    1))`.

    Args:
        false_alarm_rate: the probability that a stream without a shift ever raises an alarm, in (0, 1); half
            of it is spent on the calibration.
        bound: `"wsr"` (rigorous), `"empirical_bernstein"` (rigorous, wide), `"bootstrap"` (as published,
            asymptotic), `"subexponential"` (a fitted envelope, no guarantee) or `"plugin"` (UNSAFE, for
            comparison alone).
        onset: `"harmonic"`, a mixture over unknown onsets, or `"plain"`, a bet on a shift at the very start.
        two_sided: bet on smaller scores too.
        familywise: whether the rate is that of all segments together.
        bets: lambda, each in (0, 10].
        clip: scores count up to so many standard deviations from their mean.
        smallest_shift: see `ScoreDetector`.
        resamples: number of resampled means of the bound `bootstrap`.
        seed: of the generator that draws them.
        non_finite: `"skip"`: scores that are NaN or infinite are counted in `.skipped` and change nothing
            else; `"raise"`: they are refused.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        false_alarm_rate: float = 0.05,
        bound: str = "wsr",
        onset: str = "harmonic",
        two_sided: bool = False,
        *,
        familywise: bool = False,
        bets: Sequence[float] = BETS,
        clip: float = 4.0,
        smallest_shift: float = 0.25,
        resamples: int = 200,
        seed: int = 0,
        non_finite: str = "skip",
    ) -> None:
        check_range("false_alarm_rate", false_alarm_rate, low=0.0, high=1.0, low_open=True)
        check_choice("onset", onset, ("harmonic", "plain"))
        super().__init__(
            {"false_alarm_rate": float(false_alarm_rate), "onset": onset, "familywise": bool(familywise)},
            _kernel.HARMONIC if onset == "harmonic" else _kernel.PLAIN,
            non_finite,
            bound=bound,
            error=false_alarm_rate / 2,
            two_sided=two_sided,
            bets=bets,
            clip=clip,
            smallest_shift=smallest_shift,
            resamples=resamples,
            seed=seed,
        )
        self.false_alarm_rate = float(false_alarm_rate)
        self.familywise = bool(familywise)

    @property
    def log_wealth(self) -> float:
        """The logarithm of M, 0 at the start and after an alarm.

        Raises:
            RuntimeError: if the detector is not calibrated.
        """
        return self._statistic()

    def _log_threshold(self, segment: int) -> float:
        return log_ville_threshold(self.false_alarm_rate, self.familywise, segment)


def log_ville_threshold(false_alarm_rate: float, familywise: bool, segment: int) -> float:
    """The logarithm of 2 / rate; `familywise`: the k-th rate is `false_alarm_rate / (k (k + 1))`."""
    # sum_k 1 / (k (k + 1)) = 1
    share = segment * (segment + 1) if familywise else 1
    return math.log(2 * share / false_alarm_rate)
