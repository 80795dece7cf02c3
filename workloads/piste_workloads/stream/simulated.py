"""Simulated scores: laws with a planted shift, the same from any sequence number.

Events are drawn in blocks, each by a generator of its own that is seeded from the run's seed, the stream and
the block: a source needs no state to start again anywhere. Laws, and what a shift of d standard deviations
makes of them::

    gamma            Gamma(2, 1)                               s + d sqrt(2)
    gaussian         N(0, 1)                                   s + d
    lognormal        exp N(0, 1)                               s + d sqrt((e - 1) e)
    autoregressive   s_t = r s_(t-1) + sqrt(1 - r^2) N(0, 1)   s + d,  s_t stationary, of variance 1

Scores of the last are dependent, so that a detector's level does not hold for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from piste_workloads.stream.config import Config, Source

Array = NDArray[np.float64]

BLOCK = 1000
DEVIATION = {
    "gamma": math.sqrt(2.0),
    "gaussian": 1.0,
    "lognormal": math.sqrt((math.e - 1) * math.e),
    "autoregressive": 1.0,
}
_CALIBRATION, _STREAM = 0, 1


class SimulatedSource:
    """The events of some streams.

    Args:
        config: The recipe.
        numbers: The streams.
    """

    def __init__(self, config: Config, numbers: Sequence[int]) -> None:
        self._source, self._seed = config.source, config.seed
        self._numbers = numbers
        # An autoregressive stream's last event and the number of the next: to go on is cheap, to go elsewhere
        # starts from its beginning.
        self._last: dict[int, tuple[int, float]] = {}

    def read(self, first: int, count: int) -> Mapping[int, Array]:
        """Scores of each stream from sequence number `first` on."""
        end = min(first + count, self._source.events)
        return {number: self._shifted(number, first, end) for number in self._numbers}

    def _shifted(self, number: int, first: int, end: int) -> Array:
        if end <= first:
            return np.empty(0)
        if self._source.name == "autoregressive":
            scores = self._autoregressive(number, first, end)
        else:
            scores = _drawn(self._source, self._seed, (number, _STREAM), first, end)
        begin = max(self._source.onset - first, 0)
        if self._source.shift != 0.0:
            scores[begin:] += self._source.shift * DEVIATION[self._source.name]
        return scores

    def _autoregressive(self, number: int, first: int, end: int) -> Array:
        position, last = self._last.get(number, (0, math.nan))
        if position != first:
            position, last = 0, math.nan
        noise = _drawn(self._source, self._seed, (number, _STREAM), position, end)
        scores = _filtered(noise, self._source.correlation, last)
        self._last[number] = (end, float(scores[-1]))
        return scores[first - position :]


def calibration(config: Config, number: int) -> Array:
    """The scores that a stream's detectors are calibrated with, `(source.calibration,)`, never shifted."""
    source = config.source
    drawn = _drawn(source, config.seed, (number, _CALIBRATION), 0, source.calibration)
    return _filtered(drawn, source.correlation, math.nan) if source.name == "autoregressive" else drawn


def samples(config: Config, count: int) -> tuple[Array, Array]:
    """Scores before and after the shift, `(count,)` each, of no stream: to compute what is to be expected."""
    source = config.source
    before, after = (_drawn(source, config.seed, (part,), 0, count) for part in (0, 1))
    return before, after + source.shift * DEVIATION[source.name]


def _drawn(source: Source, seed: int, key: tuple[int, ...], first: int, end: int) -> Array:
    """Draws `first` to `end` of a sequence of independent ones."""
    blocks = range(first // BLOCK, (end - 1) // BLOCK + 1)
    drawn = np.concatenate([_block(source, seed, (*key, block)) for block in blocks])
    return drawn[first - blocks.start * BLOCK : end - blocks.start * BLOCK]


def _block(source: Source, seed: int, key: tuple[int, ...]) -> Array:
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
    if source.name == "gamma":
        return generator.gamma(2.0, 1.0, BLOCK)
    if source.name == "lognormal":
        return generator.lognormal(0.0, 1.0, BLOCK)
    return generator.standard_normal(BLOCK)


def _filtered(noise: Array, correlation: float, last: float) -> Array:
    """An autoregressive sequence that goes on after `last`, or that begins where it is NaN."""
    scale = math.sqrt(1.0 - correlation * correlation)
    scores = np.empty_like(noise)
    for index, each in enumerate(noise.tolist()):
        # s_t = r s_(t-1) + sqrt(1 - r^2) N(0, 1), and s_0 = N(0, 1)
        last = each if math.isnan(last) else correlation * last + scale * each
        scores[index] = last
    return scores
