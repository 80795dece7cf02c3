"""Detectors of other packages, to be compared with ours: what they share.

None of them promises a rate of false alarms over time: see `river_peers.py` and `martingale_peers.py`. A
package is imported when one of its detectors is built, as an actor that was killed is to be back soon.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from piste.errors import BadInput
from piste_algorithms.martingales import Alarm, _kernel
from piste_algorithms.martingales.detector import Array, Detector, Scores, as_scores

Numbers = NDArray[np.int64]  # of events


class Peer(Detector):
    """A detector of another package, with the methods and the state of ours.

    An alarm's `bet` is 0: there is none.

    Args:
        settings: see `Detector`.
        non_finite: see `Detector`.
    """

    beginning: ClassVar[float]  # the statistic before the first event and after an alarm
    calibration_points = 2

    def __init__(self, settings: dict[str, Any], non_finite: str) -> None:
        super().__init__(settings, _kernel.PLAIN, non_finite)  # no recursion of the kernel is used

    def calibrate(self, scores: Scores) -> None:
        """Takes scores of the source; the stream begins anew.

        Args:
            scores: `(n,)`.

        Raises:
            ValueError: They are too few, or one is not finite where the policy is to raise.
        """
        values = as_scores("scores", scores, finite=self._non_finite == "raise")
        values = values[np.isfinite(values)]
        if len(values) < self.calibration_points:
            raise ValueError(
                f"scores must hold at least {self.calibration_points} finite ones, got {len(values)}"
            )
        self._take_source(values)
        self._calibrated(np.empty(0), np.empty(0))

    def update_many(self, scores: Scores) -> list[Alarm]:
        """See `Detector.update_many`."""
        self._statistic()  # calibrated
        values = as_scores("scores", scores, finite=self._non_finite == "raise")
        finite = np.isfinite(values)
        evidence, numbers = self._evidence(values)[finite], self.sequence + np.flatnonzero(finite)
        self.skipped += int((~finite).sum())
        found = []
        index = 0
        while index < len(evidence):
            taken, onset = self._advance(evidence[index:], numbers[index:])
            index += taken
            if onset is not None:
                self.alarms += 1
                sequence = int(numbers[index - 1])
                threshold = self._log_threshold(self.alarms)
                found.append(Alarm(sequence, onset, self._log_value, threshold, 0.0, self.alarms))
                self._restart(sequence + 1)
        self.sequence += len(values)
        return found

    def state_dict(self) -> dict[str, Any]:
        """See `Detector.state_dict`."""
        return {**super().state_dict(), "peer": self._peer_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `Detector.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._load_peer_state(state_dict["peer"])

    def _restart(self, sequence: int) -> None:
        super()._restart(sequence)
        self._log_value = self.beginning

    def _take_source(self, scores: Array) -> None:
        """Learns from finite scores of the source."""
        raise NotImplementedError

    def _advance(self, evidence: Array, numbers: Numbers) -> tuple[int, int | None]:
        """Takes events until an alarm or the end: how many, and the alarm's onset; sets `_log_value`."""
        raise NotImplementedError

    def _peer_state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load_peer_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def imported(module: str) -> Any:
    """A module of another package.

    Raises:
        BadInput: It is not there.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0].replace("_", "-")
        raise BadInput(f"{package} is missing: pip install 'piste[streams]'") from None
