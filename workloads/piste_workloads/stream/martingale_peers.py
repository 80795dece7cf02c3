"""Martingales of online-cp and crepes as detectors of streams, over conformal p-values.

With n calibration scores and u uniform in (0, 1], drawn by the event's number::

    p = (#{calibration scores > s} + u (#{calibration scores = s} + 1)) / (n + 1)

None promises a rate of false alarms over time: such p-values are valid on average over calibration samples,
not given the one that a stream is held against. Their threshold is Ville's for p-values that are independent
and uniform, which these are not. After an alarm the wealth is one again.

Source: Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World" (2nd ed., chapters 8 and 9).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from piste_algorithms._checks import check_integer, check_range
from piste_algorithms.martingales.detector import Array, check_choice
from piste_workloads.stream.peers import Numbers, Peer, imported


class PValuePeer(Peer):
    """A martingale of another package over conformal p-values, with an alarm at a wealth.

    Args:
        martingale: one of the class's `martingales`.
        threshold: the wealth, above 1.
        seed: of what decides between ties.
        non_finite: see `Detector`.
    """

    beginning = 0.0
    module: ClassVar[str]
    martingales: ClassVar[dict[str, str]]  # to what the package calls them

    def __init__(
        self,
        martingale: str = "simple_jumper",
        threshold: float = 20.0,
        seed: int = 0,
        *,
        non_finite: str = "skip",
    ) -> None:
        check_choice("martingale", martingale, tuple(self.martingales))
        check_range("threshold", threshold, low=1.0, low_open=True)
        check_integer("seed", seed, low=0)
        settings = {"martingale": martingale, "threshold": float(threshold), "seed": seed}
        super().__init__(settings, non_finite)
        self._name, self._threshold, self._seed = martingale, float(threshold), seed
        self._made = getattr(imported(self.module), self.martingales[martingale])
        self._reference: Array = np.empty(0)
        self._begin()

    @property
    def log_wealth(self) -> float:
        """The logarithm of the wealth, 0 at the start and after an alarm.

        Raises:
            RuntimeError: The detector is not calibrated.
        """
        return self._statistic()

    def _take_source(self, scores: Array) -> None:
        """What later scores are ranked among."""
        self._reference = np.sort(scores)

    def _evidence(self, scores: Array) -> Array:
        n = len(self._reference)
        above = n - np.searchsorted(self._reference, scores, side="right")
        equal = n - np.searchsorted(self._reference, scores, side="left") - above
        # One draw an event: where a stream goes on, the generator is moved to the event's number.
        generator = np.random.Generator(np.random.PCG64(self._seed).advance(self.sequence))
        u = 1.0 - generator.random(len(scores))
        # p = (#{calibration scores > s} + u (#{calibration scores = s} + 1)) / (n + 1)
        p: Array = (above + u * (equal + 1)) / (n + 1)
        return p

    def _log_threshold(self, segment: int) -> float:
        return math.log(self._threshold)

    def _calibration(self) -> dict[str, Any]:
        return {"reference": self._reference.tolist()}

    def _load_calibration(self, calibration: dict[str, Any]) -> None:
        self._reference = np.array(calibration["reference"], dtype=np.float64)

    def _restart(self, sequence: int) -> None:
        super()._restart(sequence)
        # The onset is the event after the least wealth so far.
        self._lowest, self._lowest_after = 0.0, sequence
        self._begin()

    def _begin(self) -> None:
        """A wealth of one."""
        raise NotImplementedError


class OnlineCp(PValuePeer):
    """A martingale of online-cp, event by event: see `PValuePeer`."""

    module = "online_cp.martingale"
    martingales: ClassVar[dict[str, str]] = {
        "simple_jumper": "SimpleJumper",
        "composite_jumper": "CompositeJumper",
        "simple_mixture": "SimpleMixtureMartingale",
    }

    def _begin(self) -> None:
        self._martingale = self._made(store_p_values=False)

    def _advance(self, evidence: Array, numbers: Numbers) -> tuple[int, int | None]:
        threshold, onset, taken = math.log(self._threshold), None, 0
        for number, p in zip(numbers.tolist(), evidence.tolist(), strict=True):
            self._martingale.update(p)
            taken += 1
            self._log_value = float(self._martingale.logM)
            if self._log_value >= threshold:
                onset = self._lowest_after
                break
            if self._log_value < self._lowest:
                self._lowest, self._lowest_after = self._log_value, number + 1
        for each in (self._martingale, *self._jumpers()):
            del each.log_martingale_values[:-1]  # it would keep them all
        return taken, onset

    def _jumpers(self) -> list[Any]:
        """The simple jumpers that it consists of."""
        if self._name == "composite_jumper":
            return list(self._martingale.Jumpers.values())
        return [self._martingale] if self._name == "simple_jumper" else []

    def _peer_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"log_wealth": float(self._martingale.logM)}
        state["jumpers"] = [
            [float(jumper.log_C), *map(float, jumper.log_C_epsilon.values())] for jumper in self._jumpers()
        ]
        if self._name == "simple_mixture":
            state |= {"count": self._martingale.n, "sum_log_p": float(self._martingale.sum_log_p)}
        return state | {"lowest": [self._lowest, self._lowest_after]}

    def _load_peer_state(self, state: dict[str, Any]) -> None:
        self._begin()
        for jumper, (log_wealth, *accounts) in zip(self._jumpers(), state["jumpers"], strict=True):
            jumper.logM = jumper.log_C = log_wealth
            jumper.log_C_epsilon = dict(zip(jumper.E, accounts, strict=True))
        self._martingale.logM = state["log_wealth"]
        if self._name == "simple_mixture":
            self._martingale.n, self._martingale.sum_log_p = state["count"], state["sum_log_p"]
        self._lowest, self._lowest_after = state["lowest"]


class Crepes(PValuePeer):
    """A martingale of crepes: see `PValuePeer`.

    The package computes one from its first p-value on, so that every batch computes all since the last alarm
    again, and the state holds these p-values: batches should be large.
    """

    module = "crepes.martingales"
    martingales: ClassVar[dict[str, str]] = {
        "simple_jumper": "SimpleJumper",
        "sleeper_stayer": "SleeperStayer",
    }

    def _begin(self) -> None:
        self._martingale = self._made()
        self._p_values: list[float] = []

    def _advance(self, evidence: Array, numbers: Numbers) -> tuple[int, int | None]:
        before = len(self._p_values)
        p_values = np.concatenate([self._p_values, evidence])
        wealth = self._martingale.apply(p_values, c=self._threshold, return_index=False)
        self._log_value = math.log(wealth[-1])
        taken = len(wealth) - before
        if wealth[-1] >= self._threshold:
            wealth = wealth[:-1]  # the alarm's own event is no least wealth
            onset = True
        else:
            self._p_values = p_values.tolist()
            onset = False
        new = np.log(wealth[before:])
        if len(new) and new.min() < self._lowest:
            index = int(new.argmin())
            self._lowest, self._lowest_after = float(new[index]), int(numbers[index]) + 1
        return taken, self._lowest_after if onset else None

    def _peer_state(self) -> dict[str, Any]:
        return {"p_values": list(self._p_values), "lowest": [self._lowest, self._lowest_after]}

    def _load_peer_state(self, state: dict[str, Any]) -> None:
        self._p_values = list(state["p_values"])
        self._lowest, self._lowest_after = state["lowest"]
