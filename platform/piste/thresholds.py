"""What a bisection found: for every stratum its probes, their seeds, and the edge between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from scipy.special import betaincinv

from piste.comparison import CONFIDENCE, Interval, ended, plain
from piste.ledger.tables import TrialRecord
from piste.space import Sweep, Values

Converged = Callable[[TrialRecord], bool]


class Probe(NamedTuple):
    """One value of the bisected parameter: `converged` of `n` seeds, and that fraction's 95 % interval."""

    value: float
    converged: int
    n: int
    interval: Interval

    @property
    def fraction(self) -> float:
        """Of its seeds, those that converged."""
        return self.converged / self.n

    @property
    def converges(self) -> bool:
        """Whether at least half of the seeds did."""
        return 2 * self.converged >= self.n


class Threshold(NamedTuple):
    """The edge between runs that converge and runs that do not, for one combination of the other values.

    Attributes:
        values: The other values.
        probes: In the order of the parameter.
        bracket: The last probe that converges and the first that does not; None where all are alike.
        threshold: The bracket's middle: geometric for a `log_uniform` entry, else arithmetic.
    """

    values: Values
    probes: tuple[Probe, ...]
    bracket: tuple[Probe, Probe] | None
    threshold: float | None


def clopper_pearson(successes: int, n: int) -> Interval:
    """The exact 95 % interval of a probability (C. J. Clopper, E. S. Pearson 1934)."""
    tail = (1.0 - CONFIDENCE) / 2.0
    # low: P(at least k of n) = tail; high: P(at most k of n) = tail
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1.0 - tail))
    return low, high


def thresholds(trials: Iterable[TrialRecord], section: Sweep, converged: Converged) -> list[Threshold]:
    """What the searcher `bisect` found.

    Args:
        trials: All trials; those that have not ended are left out.
        section: The sweep's `[sweep]`, with `[sweep.bisect]`.
        converged: Whether a trial that has ended converged.
    """
    assert section.bisect is not None
    parameter = section.bisect.parameter
    strata: dict[tuple[tuple[str, Any], ...], dict[float, list[bool]]] = {}
    for trial in ended(trials):
        others = tuple((key, plain(value)) for key, value in trial.values.items() if key != parameter)
        probes = strata.setdefault(others, {})
        probes.setdefault(trial.values[parameter], []).append(converged(trial))
    logarithmic = section.entries[parameter].log_uniform is not None
    return [_threshold(dict(others), found, logarithmic) for others, found in strata.items()]


def _threshold(values: Values, outcomes: Mapping[float, Sequence[bool]], logarithmic: bool) -> Threshold:
    probes = tuple(
        Probe(value, sum(seeds), len(seeds), clopper_pearson(sum(seeds), len(seeds)))
        for value, seeds in sorted(outcomes.items())
    )
    # from the end that converges (where both ends do or do not, from the lower one)
    walk = probes if probes[0].converges or not probes[-1].converges else probes[::-1]
    bracket = next(((a, b) for a, b in pairwise(walk) if a.converges and not b.converges), None)
    if bracket is None:
        return Threshold(values, probes, None, None)
    a, b = (probe.value for probe in bracket)
    return Threshold(values, probes, bracket, math.sqrt(a * b) if logarithmic else (a + b) / 2.0)
