"""River's ADWIN, Page-Hinkley and KSWIN as detectors of streams.

None promises a rate of false alarms over time: ADWIN's `delta` and KSWIN's `alpha` are levels of one test out
of many, and Page-Hinkley's threshold is in units of the scores. The calibration scores are their first
events, whose alarms do not count. What they do after an alarm is their own: they begin without what came
before.

Sources: Bifet and Gavalda (SDM 2007); Page (Biometrika 41, 1954); Raab, Heusinger and Schleif (Neurocomputing
416, 2020); all as river has them.
"""

from __future__ import annotations

import base64
import math
import sys
from typing import Any

from piste_algorithms._checks import check_integer, check_range
from piste_algorithms.martingales.detector import Array, check_choice
from piste_workloads.stream.peers import Numbers, Peer, imported


class RiverPeer(Peer):
    """A detector of river; it takes the scores as they are."""

    beginning = -math.inf

    @property
    def log_statistic(self) -> float:
        """The logarithm of what is compared with a threshold, minus infinity at the start.

        Raises:
            RuntimeError: The detector is not calibrated.
        """
        return self._statistic()

    def _take_source(self, scores: Array) -> None:
        """The first events of the stream, without alarms."""
        self._detector = self._fresh()
        self._warm_up(scores)

    def _warm_up(self, scores: Array) -> None:
        for score in scores.tolist():
            self._detector.update(score)

    def _evidence(self, scores: Array) -> Array:
        return scores

    def _advance(self, evidence: Array, numbers: Numbers) -> tuple[int, int | None]:
        detector, onset = self._detector, None
        taken = 0
        for number, score in zip(numbers.tolist(), evidence.tolist(), strict=True):
            self._step(score, number)
            taken += 1
            if detector.drift_detected:
                onset = max(self._onset(number), 0)
                break
        self._log_value = self._log_compared()
        return taken, onset

    def _step(self, score: float, number: int) -> None:
        self._detector.update(score)

    def _calibration(self) -> dict[str, Any]:
        return {}  # the calibration scores have become part of the detector's state

    def _load_calibration(self, calibration: dict[str, Any]) -> None:
        self._detector = self._fresh()

    def _fresh(self) -> Any:
        raise NotImplementedError

    def _log_compared(self) -> float:
        raise NotImplementedError

    def _onset(self, number: int) -> int:
        raise NotImplementedError


class Adwin(RiverPeer):
    """River's ADWIN: cuts its window where the means of its two parts differ; of larger and smaller scores.

    It shows nothing but its alarms: the log-statistic is 0 at one and minus infinity else. The onset is the
    first event of the window that is left.

    Args:
        delta: the level of one cut, in (0, 1).
        clock: events between two tests.
        non_finite: see `Detector`.
    """

    def __init__(self, delta: float = 0.002, clock: int = 32, *, non_finite: str = "skip") -> None:
        check_range("delta", delta, low=0.0, high=1.0, low_open=True)
        check_integer("clock", clock, low=1)
        super().__init__({"delta": float(delta), "clock": clock}, non_finite)
        self._options = {"delta": float(delta), "clock": clock}
        self._detector = self._fresh()

    def _fresh(self) -> Any:
        return imported("river.drift").ADWIN(**self._options)

    def _log_compared(self) -> float:
        return 0.0 if self._detector.drift_detected else -math.inf

    def _log_threshold(self, segment: int) -> float:
        return 0.0

    def _onset(self, number: int) -> int:
        return number - int(self._detector.width) + 1

    def _peer_state(self) -> dict[str, Any]:
        window = base64.b64encode(self._detector._helper.__getstate__()).decode("ascii")
        return {"window": window, "drift": bool(self._detector.drift_detected)}

    def _load_peer_state(self, state: dict[str, Any]) -> None:
        self._detector._helper.__setstate__(base64.b64decode(state["window"]))
        self._detector._drift_detected = state["drift"]


class PageHinkley(RiverPeer):
    """River's Page-Hinkley test: the sum of deviations from the running mean, less its least value so far.

    The onset is the event after that least (or largest) value.

    Args:
        threshold: of the sum, in units of the scores, above 0.
        delta: what is taken from each deviation, at least 0.
        min_instances: events before the first test.
        alpha: what the sum is multiplied with before each event, in (0, 1].
        mode: of larger scores, `"up"`, smaller ones, `"down"`, or `"both"`.
        non_finite: see `Detector`.
    """

    def __init__(
        self,
        threshold: float = 50.0,
        delta: float = 0.005,
        min_instances: int = 30,
        alpha: float = 0.9999,
        mode: str = "up",
        *,
        non_finite: str = "skip",
    ) -> None:
        check_range("threshold", threshold, low=0.0, low_open=True)
        check_range("delta", delta, low=0.0)
        check_integer("min_instances", min_instances, low=1)
        check_range("alpha", alpha, low=0.0, high=math.nextafter(1.0, 2.0), low_open=True)
        check_choice("mode", mode, ("up", "down", "both"))
        self._options: dict[str, Any] = {
            "threshold": float(threshold),
            "delta": float(delta),
            "min_instances": min_instances,
            "alpha": float(alpha),
            "mode": mode,
        }
        super().__init__(self._options, non_finite)
        self._detector = self._fresh()

    def _fresh(self) -> Any:
        self._lowest_after = self._highest_after = 0
        return imported("river.drift").PageHinkley(**self._options)

    def _warm_up(self, scores: Array) -> None:
        super()._warm_up(scores)
        self._lowest_after = self._highest_after = 0

    def _step(self, score: float, number: int) -> None:
        detector = self._detector
        lowest, highest = detector._min_increase, detector._max_decrease
        detector.update(score)
        if detector._min_increase != lowest:
            self._lowest_after = number + 1
        if detector._max_decrease != highest:
            self._highest_after = number + 1

    def _sums(self) -> tuple[float, float]:
        """What is compared with the threshold, upwards and downwards."""
        detector = self._detector
        up = float(detector._sum_increase - detector._min_increase)
        down = float(detector._max_decrease - detector._sum_decrease)
        return (up if detector.mode != "down" else 0.0), (down if detector.mode != "up" else 0.0)

    def _log_compared(self) -> float:
        compared = max(self._sums())
        return math.log(compared) if compared > 0.0 else -math.inf

    def _log_threshold(self, segment: int) -> float:
        return math.log(self._options["threshold"])

    def _onset(self, number: int) -> int:
        up, down = self._sums()
        return min(self._lowest_after if up >= down else self._highest_after, number)

    def _peer_state(self) -> dict[str, Any]:
        detector = self._detector
        return {
            "count": float(detector._x_mean.n),
            "mean": float(detector._x_mean.get()),
            "sums": [float(detector._sum_increase), float(detector._sum_decrease)],
            "extremes": [float(detector._min_increase), float(detector._max_decrease)],
            "after": [self._lowest_after, self._highest_after],
            "drift": bool(detector.drift_detected),
        }

    def _load_peer_state(self, state: dict[str, Any]) -> None:
        detector = self._detector
        detector._x_mean = type(detector._x_mean)._from_state(state["count"], state["mean"])
        detector._sum_increase, detector._sum_decrease = state["sums"]
        detector._min_increase, detector._max_decrease = state["extremes"]
        self._lowest_after, self._highest_after = state["after"]
        detector._drift_detected = state["drift"]


class Kswin(RiverPeer):
    """River's KSWIN: Kolmogorov and Smirnov's test of the newest scores against a draw of those before.

    The log-statistic is minus the logarithm of the test's p-value. The onset is the first of the newest
    scores.

    Args:
        alpha: the level of one test, in (0, 1).
        window_size: scores that are kept; the window begins with the last calibration scores.
        stat_size: how many of them are the newest, and how many are drawn; at most half of the window.
        seed: of the draws.
        non_finite: see `Detector`.
    """

    def __init__(
        self,
        alpha: float = 0.005,
        window_size: int = 100,
        stat_size: int = 30,
        seed: int = 0,
        *,
        non_finite: str = "skip",
    ) -> None:
        check_range("alpha", alpha, low=0.0, high=1.0, low_open=True)
        check_integer("stat_size", stat_size, low=2)
        check_integer("window_size", window_size, low=2 * stat_size)
        check_integer("seed", seed, low=0)
        sizes = {"window_size": window_size, "stat_size": stat_size, "seed": seed}
        self._options = {"alpha": float(alpha), **sizes}
        super().__init__(self._options, non_finite)
        self._detector = self._fresh()

    def _fresh(self) -> Any:
        return imported("river.drift").KSWIN(**self._options)

    def _warm_up(self, scores: Array) -> None:
        self._detector.window.extend(scores[-self._detector.window_size :].tolist())

    def _log_compared(self) -> float:
        tested = len(self._detector.window) == self._detector.window_size or self._detector.drift_detected
        # A p-value may underflow.
        return -math.log(max(self._detector.p_value, sys.float_info.min)) if tested else -math.inf

    def _log_threshold(self, segment: int) -> float:
        return -math.log(self._options["alpha"])

    def _onset(self, number: int) -> int:
        return number - int(self._detector.stat_size) + 1

    def _peer_state(self) -> dict[str, Any]:
        version, words, gauss = self._detector._rng.getstate()
        return {
            "window": list(self._detector.window),
            "generator": [version, list(words), gauss],
            "events": self._detector.n,
            "p_value": float(self._detector.p_value),
            "drift": bool(self._detector.drift_detected),
        }

    def _load_peer_state(self, state: dict[str, Any]) -> None:
        version, words, gauss = state["generator"]
        self._detector._rng.setstate((version, tuple(words), gauss))
        self._detector.window.extend(state["window"])
        self._detector.n, self._detector.p_value = state["events"], state["p_value"]
        self._detector._drift_detected = state["drift"]
