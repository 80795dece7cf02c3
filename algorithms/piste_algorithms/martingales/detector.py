"""What the detectors share: numbered events in, alarms out, and a state that continues bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from piste_algorithms.martingales import _kernel

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]
Scores: TypeAlias = "Iterable[float] | Array | Tensor"

POLICIES = ("skip", "raise")


@dataclass(frozen=True, slots=True)
class Alarm:
    """A shift that a detector has found.

    Attributes:
        sequence: number of the event that raised it, counted from 0 over the whole stream, skipped events
            too.
        onset: estimated number of the first shifted event: where the sum of the winning bet's log-factors
            since is largest.
        log_wealth: logarithm of the detector's statistic at the alarm.
        log_threshold: what it had to reach.
        bet: the bet lambda that won most; kappa - 1 of a conformal detector.
        segment: 1 for the stream's first alarm, 2 for the second, ...
    """

    sequence: int
    onset: int
    log_wealth: float
    log_threshold: float
    bet: float
    segment: int


class Detector:
    """The base of the detectors: a subclass turns scores into evidence and says its threshold.

    Attributes:
        sequence: events taken so far, skipped ones too; the number of the next event.
        skipped: events that were not finite.
        alarms: alarms raised so far.

    Args:
        settings: what the subclass was built with; a state is loaded by a detector of equal settings alone.
        recursion: a recursion of the kernel.
        non_finite: what a score that is NaN or infinite does: `"skip"`, it is counted and changes nothing
            else, or `"raise"`.
    """

    def __init__(self, settings: dict[str, Any], recursion: int, non_finite: str) -> None:
        check_choice("non_finite", non_finite, POLICIES)
        self._settings = {"kind": type(self).__name__, **settings, "non_finite": non_finite}
        self._recursion = recursion
        self._non_finite = non_finite
        self._bets: Array | None = None
        self._log_bounds: Array = np.empty(0)
        self.sequence = self.skipped = self.alarms = 0
        self._clock = 0
        self._log_value = 0.0
        self._log_values: Array = np.empty(0)
        self._cusums: Array = np.empty(0)
        self._onsets: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def update(self, score: float) -> Alarm | None:
        """Take one event.

        Args:
            score: its score; larger is stranger.

        Returns:
            The alarm that it raised, or None. After an alarm the statistic starts anew.

        Raises:
            ValueError: if `score` is no number, or not finite where the policy is to raise.
            RuntimeError: if the detector is not calibrated.
        """
        found = self.update_many([score])
        return found[0] if found else None

    def update_many(self, scores: Scores) -> list[Alarm]:
        """Take events in their order; the same bits as taking them one by one, or in any batches.

        Args:
            scores: `(events,)`.

        Returns:
            The alarms that they raised.

        Raises:
            ValueError: if `scores` is no vector of numbers, or holds one that is not finite where the policy
            is
                to raise; nothing has changed then.
            RuntimeError: if the detector is not calibrated.
        """
        if self._bets is None:
            raise RuntimeError(f"{type(self).__name__} is not calibrated: call calibrate(scores) first")
        evidence = self._evidence(as_scores("scores", scores, finite=self._non_finite == "raise"))
        found = []
        index = 0
        while index < len(evidence):
            log_threshold = self._log_threshold(self.alarms + 1)
            index, self._clock, skipped, self._log_value, alarm = _kernel.advance(
                evidence,
                index,
                self.sequence,
                self._clock,
                self._recursion,
                log_threshold,
                self._bets,
                self._log_bounds,
                self._log_values,
                self._cusums,
                self._onsets,
            )
            self.skipped += skipped
            if alarm:
                self.alarms += 1
                best = int(np.argmax(self._log_values))
                found.append(
                    Alarm(
                        sequence=self.sequence + index - 1,
                        onset=int(self._onsets[best]),
                        log_wealth=self._log_value,
                        log_threshold=log_threshold,
                        bet=float(self._bets[best]),
                        segment=self.alarms,
                    )
                )
                self._restart(self.sequence + index)
        self.sequence += len(evidence)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Settings, calibration and statistic: numbers, strings and lists of them, exact.

        Raises:
            RuntimeError: if the detector is not calibrated.
        """
        if self._bets is None:
            raise RuntimeError(f"{type(self).__name__} is not calibrated: it has no state yet")
        return {
            "settings": dict(self._settings),
            "calibration": self._calibration(),
            "bets": self._bets.tolist(),
            "log_bounds": self._log_bounds.tolist(),
            "sequence": self.sequence,
            "skipped": self.skipped,
            "alarms": self.alarms,
            "clock": self._clock,
            "log_value": self._log_value,
            "log_values": self._log_values.tolist(),
            "cusums": self._cusums.tolist(),
            "onsets": self._onsets.tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, bit for bit.

        Raises:
            ValueError: if it is the state of a detector with other settings; the message names the
            difference.
        """
        theirs = state_dict["settings"]
        for name in sorted({*theirs, *self._settings}):
            mine, other = self._settings.get(name), theirs.get(name)
            if mine != other:
                raise ValueError(f"state_dict is of a detector with {name}={other!r}, this one has {mine!r}")
        self._load_calibration(state_dict["calibration"])
        self._bets = np.array(state_dict["bets"], dtype=np.float64)
        self._log_bounds = np.array(state_dict["log_bounds"], dtype=np.float64)
        self.sequence, self.skipped = state_dict["sequence"], state_dict["skipped"]
        self.alarms, self._clock = state_dict["alarms"], state_dict["clock"]
        self._log_value = state_dict["log_value"]
        self._log_values = np.array(state_dict["log_values"], dtype=np.float64)
        self._cusums = np.array(state_dict["cusums"], dtype=np.float64)
        self._onsets = np.array(state_dict["onsets"], dtype=np.int64)

    def _calibrated(self, bets: Array, log_bounds: Array) -> None:
        """Begin a stream with these bets."""
        self._bets, self._log_bounds = bets, log_bounds
        self.sequence = self.skipped = self.alarms = 0
        self._restart(0)

    def _restart(self, sequence: int) -> None:
        """Begin anew with the event of that number."""
        assert self._bets is not None
        plain = self._recursion == _kernel.PLAIN
        self._clock = 0
        self._log_values = np.full(len(self._bets), 0.0 if plain else -math.inf)
        self._cusums = np.zeros(len(self._bets))
        self._onsets = np.full(len(self._bets), sequence, dtype=np.int64)
        begins_at_one = self._recursion in (_kernel.PLAIN, _kernel.HARMONIC)
        self._log_value = 0.0 if begins_at_one else -math.inf

    def _statistic(self) -> float:
        if self._bets is None:
            raise RuntimeError(f"{type(self).__name__} is not calibrated: call calibrate(scores) first")
        return self._log_value

    def _evidence(self, scores: Array) -> Array:
        """What the bets are laid on, event by event; not finite where the score is not."""
        raise NotImplementedError

    def _log_threshold(self, segment: int) -> float:
        raise NotImplementedError

    def _calibration(self) -> dict[str, Any]:
        """What `_evidence` needs."""
        raise NotImplementedError

    def _load_calibration(self, calibration: dict[str, Any]) -> None:
        raise NotImplementedError


def as_scores(name: str, scores: Scores, *, finite: bool) -> Array:
    """A writable, contiguous float64 vector, which the kernel is compiled for.

    Raises:
        ValueError: if `scores` is no vector of numbers, or with `finite` one of them is not finite.
    """
    # A tensor may be on another device and be part of a graph.
    values: Any = scores.detach().cpu().numpy() if hasattr(scores, "detach") else scores
    if isinstance(values, Iterable) and not isinstance(values, np.ndarray):
        values = list(values)
    try:
        array = np.require(values, dtype=np.float64, requirements=["C", "W"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a vector of numbers, got {scores!r}") from error
    if array.ndim != 1:
        raise ValueError(f"{name} must be a vector of numbers, got the shape {array.shape}")
    if finite and not np.isfinite(array).all():
        index = int(np.argmin(np.isfinite(array)))
        raise ValueError(f"{name} must be finite, got {array[index]} at index {index}")
    return array


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
