"""Laws of scores, standardised to mean 0 and standard deviation 1, and what a binomial count may be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Law = Callable[[np.random.Generator, int], Array]

# One test fails by chance with at most this probability.
FALSE_FAILURE = 1e-7


def gamma(generator: np.random.Generator, n: int) -> Array:
    return (generator.gamma(2.0, size=n) - 2.0) / math.sqrt(2.0)


def gaussian(generator: np.random.Generator, n: int) -> Array:
    return generator.normal(size=n)


def lognormal(generator: np.random.Generator, n: int) -> Array:
    sigma = 0.8
    mean = math.exp(sigma**2 / 2)
    spread = mean * math.sqrt(math.exp(sigma**2) - 1)
    return (generator.lognormal(sigma=sigma, size=n) - mean) / spread


LAWS: dict[str, Law] = {"gamma": gamma, "gaussian": gaussian, "lognormal": lognormal}


def quantiles(law: str, n: int) -> Array:
    """`n` equally likely values of a law, the middles of its quantiles."""
    u = (np.arange(n) + 0.5) / n
    if law == "gaussian":
        return np.asarray(stats.norm.ppf(u))
    if law == "gamma":
        return np.asarray((stats.gamma.ppf(u, 2.0) - 2.0) / math.sqrt(2.0))
    frozen = stats.lognorm(0.8)
    return np.asarray((frozen.ppf(u) - frozen.mean()) / frozen.std())


def most_successes(trials: int, probability: float) -> int:
    """What a count of successes, each of at most this probability, exceeds in one test of ten million."""
    return int(stats.binom.isf(FALSE_FAILURE, trials, probability))


def fewest_successes(trials: int, probability: float) -> int:
    """What a count of successes, each of at least this probability, falls below as rarely."""
    return int(stats.binom.ppf(FALSE_FAILURE, trials, probability))
