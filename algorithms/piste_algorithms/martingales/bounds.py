"""Upper bounds of a score's exponential moments from a calibration sample.

A detector bets with `e = exp(lambda z - psi)`. Its false-alarm rate holds at any time if `psi` is at least
the logarithm of the null mean of `exp(lambda z)`; that mean is unknown, so `psi = log U` with an upper
confidence bound `U` from `n` calibration points. An estimate without a margin breaks the level: the small
excess of each event accumulates.

| bound | what it is |
|---|---|
| `wsr` | by betting (Waudby-Smith and Ramdas, JRSS B 86, 2024, arXiv:2010.09686); rigorous, tight |
| `empirical_bernstein` | Maurer and Pontil (COLT 2009, arXiv:0907.3740, theorem 4); rigorous, wide |
| `bootstrap` | the quantile of resampled means; asymptotic only; the published choice |
| `subexponential` | `nu^2 lambda^2 / 2`, the smallest such envelope of the sample; no guarantee |
| `plugin` | the sample mean itself; UNSAFE, it breaks the level, kept to show that |
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BOUNDS = ("wsr", "bootstrap", "empirical_bernstein", "subexponential", "plugin")


def wsr_upper_bound(values: Array, error: float) -> float:
    """An upper confidence bound of a mean, by betting against every candidate that is too large.

    Args:
        values: `(n,)`, independent draws in [0, 1].
        error: how often the bound may lie below the mean, in (0, 1).

    Returns:
        sup{ m in [mean, 1]: max_k prod_{i <= k} (1 - lambda_i (x_i - m)) < 1 / error }, within 1e-12.
    """
    n = len(values)
    counts = np.arange(1, n + 1)
    # mu_i = (1/2 + sum_{k <= i} x_k) / (i + 1)
    means = (0.5 + np.cumsum(values)) / (counts + 1)
    # v_i = (1/4 + sum_{k <= i} (x_k - mu_k)^2) / (i + 1)
    variances = (0.25 + np.cumsum((values - means) ** 2)) / (counts + 1)
    # lambda_i = min( sqrt(2 log(1/a) / (n v_{i-1})), 0.75 / (1 - m) ), known before x_i
    earlier = np.concatenate(([0.25], variances[:-1]))
    stakes = np.sqrt(2 * math.log(1 / error) / (n * earlier))

    def refuted(candidate: float) -> bool:
        capped = np.minimum(stakes, 0.75 / (1 - candidate)) if candidate < 1 else stakes
        capital = np.cumsum(np.log1p(capped * (candidate - values)))
        return bool(capital.max() >= math.log(1 / error))

    if not refuted(1.0):
        return 1.0
    low, high = float(values.mean()), 1.0  # the capital grows with the candidate
    while high - low > 1e-12:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return high


def empirical_bernstein_upper_bound(values: Array, error: float) -> float:
    """An upper confidence bound of a mean from the sample's variance.

    Args:
        values: `(n,)`, independent draws in [0, 1], n > 1.
        error: how often the bound may lie below the mean, in (0, 1).

    Returns:
        mean + sqrt(2 V log(2/a) / n) + 7 log(2/a) / (3 (n - 1)), at most 1.
    """
    n = len(values)
    log_term = math.log(2 / error)
    # U = mean + sqrt(2 V log(2/a) / n) + 7 log(2/a) / (3 (n - 1))
    spread = math.sqrt(2 * float(values.var(ddof=1)) * log_term / n)
    return min(1.0, float(values.mean()) + spread + 7 * log_term / (3 * (n - 1)))


def log_moment_bounds(
    evidence: Array,
    bets: Array,
    clip: float,
    bound: str,
    error: float,
    resamples: int,
    generator: np.random.Generator,
) -> Array:
    """psi_j: the logarithms of bounds of the means of exp(lambda_j z), which fail together at one error.

    Args:
        evidence: `(n,)`, standardised calibration scores in [-clip, clip].
        bets: `(bets,)`, lambda.
        clip: bound of |z|.
        bound: one of `BOUNDS`.
        error: how often any of the bounds may be too low (without meaning for `subexponential` and `plugin`).
        resamples: number of resampled means of `bootstrap`.
        generator: draws them.

    Returns:
        `(bets,)`.
    """
    # log mean_i exp(lambda_j z_i)
    empirical: Array = np.log(np.exp(bets[:, None] * evidence).mean(axis=1))
    if bound == "plugin":
        return empirical
    if bound == "subexponential":
        # nu^2 = max_j 2 log mean exp(lambda_j z) / lambda_j^2;  psi_j = nu^2 lambda_j^2 / 2
        return np.asarray(max(0.0, float((2 * empirical / bets**2).max())) * bets**2 / 2)
    share = error / len(bets)
    if bound == "bootstrap":
        powers = np.exp(bets[:, None] * evidence)
        means = np.empty((resamples, len(bets)))
        for row in range(resamples):
            means[row] = powers[:, generator.integers(len(evidence), size=len(evidence))].mean(axis=1)
        return np.asarray(np.log(np.quantile(means, 1 - share, axis=0, method="higher")))
    upper: dict[str, Callable[[Array, float], float]] = {
        "wsr": wsr_upper_bound,
        "empirical_bernstein": empirical_bernstein_upper_bound,
    }
    # x = exp(lambda z) / exp(|lambda| B) in [0, 1];  psi = |lambda| B + log U(x)
    tops = np.abs(bets) * clip
    scaled = np.exp(bets[:, None] * evidence - tops[:, None])
    return np.array([top + math.log(upper[bound](row, share)) for top, row in zip(tops, scaled, strict=True)])
