"""What the events of a stream go through: its detectors, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from piste.shards import Taken
from piste_algorithms.martingales import Alarm
from piste_algorithms.martingales.detector import Detector
from piste_workloads.stream.config import Config

Saved = tuple[dict[str, Any], dict[str, Any]]

_ORIGIN = ("settings", "calibration", "bets", "log_bounds")  # of a detector's state, what never changes


class Scores:
    """The detectors of a stream of scores.

    Args:
        config: The recipe.
        calibration: `(n,)` scores that a fresh stream is calibrated with.
        saved: What `origin` and `state` of an earlier one returned, to go on from.
    """

    def __init__(self, config: Config, calibration: NDArray[np.float64] | None, saved: Saved | None) -> None:
        self.detectors: dict[str, Detector] = {n: d.build() for n, d in config.detectors.items()}
        self._raises = any(d.options.get("non_finite") == "raise" for d in config.detectors.values())
        for name, detector in self.detectors.items():
            if saved is not None:
                detector.load_state_dict({**saved[0][name], **saved[1][name]})
            else:
                detector.calibrate(calibration)  # type: ignore[attr-defined]
        self._parameters = {n: d.state_dict()["settings"] for n, d in self.detectors.items()}

    @property
    def skipped(self) -> int:
        """Events that were not finite."""
        return max(detector.skipped for detector in self.detectors.values())

    @property
    def wealth(self) -> Mapping[str, float]:
        """The logarithm of each detector's statistic."""
        return {name: log_statistic(detector) for name, detector in self.detectors.items()}

    def take(self, events: NDArray[np.float64]) -> Taken:
        """Takes the stream's next scores; one that is to be refused ends it."""
        failure = None
        if self._raises and not np.isfinite(events).all():
            index = int(np.argmin(np.isfinite(events)))
            failure, events = f"its score is {events[index]}", events[:index]
        alarms = [
            alarm_columns(name, self._parameters[name], alarm)
            for name, detector in self.detectors.items()
            for alarm in detector.update_many(events)
        ]
        return Taken(len(events), alarms, failure=failure)

    def origin(self) -> dict[str, Any]:
        """What never changes of the state."""
        return {n: _part(d.state_dict(), True) for n, d in self.detectors.items()}

    def state(self) -> dict[str, Any]:
        """What every event changes."""
        return {n: _part(d.state_dict(), False) for n, d in self.detectors.items()}


def _part(state: dict[str, Any], constant: bool) -> dict[str, Any]:
    return {key: value for key, value in state.items() if (key in _ORIGIN) == constant}


def log_statistic(detector: Detector) -> float:
    """The log-wealth; the log-statistic of one that has no wealth."""
    found: float = getattr(detector, "log_wealth" if hasattr(detector, "log_wealth") else "log_statistic")
    return found


def alarm_columns(name: str, parameters: dict[str, Any], alarm: Alarm) -> dict[str, Any]:
    """An alarm as the ledger takes it."""
    return {
        "detector": name,
        "sequence": alarm.sequence,
        "onset": alarm.onset,
        "log_wealth": alarm.log_wealth,
        "log_threshold": alarm.log_threshold,
        "details": {"bet": alarm.bet, "segment": alarm.segment, "parameters": parameters},
    }
