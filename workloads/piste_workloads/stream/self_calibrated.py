"""A stream whose own first events calibrate its detectors, as they come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from piste.shards import Taken
from piste_workloads.stream.config import Config
from piste_workloads.stream.processing import Saved, Scores


class SelfCalibrated:
    """The detectors of a stream that is not known beforehand, such as the metric of a run in progress.

    The first `source.calibration` finite scores calibrate; nothing is bet on them. A score that is not finite
    is counted and skipped, before and after.

    Args:
        config: The recipe.
        saved: What `origin` and `state` of an earlier one returned, to go on from.
    """

    def __init__(self, config: Config, saved: Saved | None) -> None:
        self._config = config
        state: dict[str, Any] = {"scores": [], "taken": 0, "skipped": 0, "last": math.nan, "detectors": None}
        state |= saved[1] if saved is not None else {}
        self._calibration: list[float] = list(state["scores"])
        self._taken: int = state["taken"]  # events until the detectors were calibrated
        self._skipped: int = state["skipped"]  # of these
        self._last: float = state["last"]
        held = state["detectors"]
        self._scores = None if held is None else Scores(config, None, (held["origin"], held["state"]))

    @property
    def skipped(self) -> int:
        """Events that were not finite."""
        return self._skipped + (self._scores.skipped if self._scores is not None else 0)

    @property
    def wealth(self) -> Mapping[str, float]:
        """The logarithm of each detector's statistic; nothing before they are calibrated."""
        return self._scores.wealth if self._scores is not None else {}

    def take(self, events: Sequence[float]) -> Taken:
        """Takes the stream's next events."""
        values = np.asarray(events, dtype=np.float64)
        scores = np.diff(values, prepend=self._last) if self._config.source.score == "difference" else values
        taken = self._take(scores)
        if taken.count:
            self._last = float(values[taken.count - 1])
        return taken

    def _take(self, scores: NDArray[np.float64]) -> Taken:
        lacking = self._config.source.calibration - len(self._calibration)
        used = 0
        if self._scores is None:
            finite = np.flatnonzero(np.isfinite(scores))
            used = int(finite[lacking - 1]) + 1 if len(finite) >= lacking else len(scores)
            mine = scores[:used]
            self._calibration += mine[np.isfinite(mine)].tolist()
            self._taken += used
            self._skipped += int((~np.isfinite(mine)).sum())
            if len(self._calibration) == self._config.source.calibration:
                try:
                    self._scores = Scores(self._config, np.array(self._calibration), None)
                except ValueError as error:
                    return Taken(0, failure=f"calibration: {error}")
        if self._scores is None or used == len(scores):
            return Taken(len(scores))
        taken = self._scores.take(scores[used:])
        alarms = [
            {**alarm, "sequence": alarm["sequence"] + self._taken, "onset": alarm["onset"] + self._taken}
            for alarm in taken.alarms
        ]
        return Taken(used + taken.count, alarms, failure=taken.failure)

    def origin(self) -> dict[str, Any]:
        """Nothing: all of the state changes once, when the detectors are calibrated."""
        return {}

    def state(self) -> dict[str, Any]:
        """All of the state."""
        held = self._scores
        return {
            "scores": self._calibration,
            "taken": self._taken,
            "skipped": self._skipped,
            "last": self._last,
            "detectors": None if held is None else {"origin": held.origin(), "state": held.state()},
        }
