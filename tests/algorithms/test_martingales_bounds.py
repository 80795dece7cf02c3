"""Calibration bounds: a reference written like the paper, coverage, and what has none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize
from tests.algorithms.score_laws import LAWS, Array, fewest_successes, gamma, most_successes, quantiles

from piste_algorithms.martingales.bounds import (
    empirical_bernstein_upper_bound,
    log_moment_bounds,
    wsr_upper_bound,
)

BETS = np.array([0.1, 0.25, 0.5, 1.0, -0.5])
CLIP = 4.0


def log_capital(values: Array, candidate: float, error: float) -> float:
    """The largest log-capital of the bet against a candidate, one point after the other as it is written."""
    n, total, squares, variance = len(values), 0.0, 0.0, 0.25
    capital, largest = 0.0, -math.inf
    for i, x in enumerate(values.tolist(), 1):
        stake = math.sqrt(2 * math.log(1 / error) / (n * variance))
        if candidate < 1:
            stake = min(stake, 0.75 / (1 - candidate))
        capital += math.log(1 - stake * (x - candidate))
        largest = max(largest, capital)
        total += x
        squares += (x - (0.5 + total) / (i + 1)) ** 2
        variance = (0.25 + squares) / (i + 1)
    return largest


@pytest.mark.parametrize("error", [0.2, 0.00625, 1e-7])
@pytest.mark.parametrize("n", [20, 400])
def test_the_betting_bound_is_the_papers(n: int, error: float) -> None:
    values = np.random.default_rng(n).beta(1.0, 6.0, size=n)
    bound = wsr_upper_bound(values, error)
    root = optimize.brentq(
        lambda m: log_capital(values, m, error) - math.log(1 / error), float(values.mean()), 1.0, xtol=1e-13
    )
    assert bound == pytest.approx(root, abs=1e-10)


def test_the_betting_bound_of_few_points_says_nothing() -> None:
    assert wsr_upper_bound(np.array([0.2, 0.1]), 1e-6) == 1.0


def test_constant_values_are_bounded_closely() -> None:
    # Each refutation multiplies by 1 + lambda (m - x), so the width falls like log(1 / a) / n.
    widths = [wsr_upper_bound(np.full(n, 0.3), 0.01) - 0.3 for n in (200, 800, 3200)]
    assert all(width > 0 for width in widths)
    assert widths[2] < widths[1] / 2 < widths[0] / 4


def moments(law: str, draws: int, n: int, bound: str, error: float) -> Array:
    """Bounds of the null moments for many calibration samples, `(draws, bets)`."""
    generator = np.random.default_rng(1)
    rows = []
    for _ in range(draws):
        z = np.clip(LAWS[law](generator, n), -CLIP, CLIP)
        rows.append(log_moment_bounds(z, BETS, CLIP, bound, error, 400, generator))
    return np.array(rows)


def true_log_moments(law: str) -> Array:
    """By quantiles; each mean is of a monotone function in [0, e^4], so it is within e^4 / 400,000."""
    z = np.clip(quantiles(law, 200_000), -CLIP, CLIP)
    return np.array([math.log(float(np.exp(bet * z).mean())) for bet in BETS])


@pytest.mark.parametrize("law", sorted(LAWS))
@pytest.mark.parametrize("bound", ["wsr", "empirical_bernstein"])
def test_rigorous_bounds_fail_no_more_often_than_they_say(law: str, bound: str) -> None:
    draws, error = 300, 0.2
    failures = (moments(law, draws, 150, bound, error) < true_log_moments(law) - 3e-4).any(axis=1).sum()
    assert failures <= most_successes(draws, error)


def test_the_plugin_is_no_bound() -> None:
    draws = 300
    failures = (moments("gamma", draws, 250, "plugin", 0.2) < true_log_moments("gamma")).any(axis=1).sum()
    assert failures >= fewest_successes(draws, 0.5)


def test_the_bounds_are_ordered_by_what_they_promise() -> None:
    z = np.clip(gamma(np.random.default_rng(3), 1000), -CLIP, CLIP)
    plugin, bootstrap, wsr, bernstein = (
        log_moment_bounds(z, BETS, CLIP, bound, 0.025, 2000, np.random.default_rng(0))
        for bound in ("plugin", "bootstrap", "wsr", "empirical_bernstein")
    )
    assert (plugin < bootstrap).all()
    assert (bootstrap < wsr).all()
    assert (wsr < bernstein).all()


def test_the_fitted_envelope_touches_the_sample_from_above() -> None:
    z = np.clip(gamma(np.random.default_rng(4), 1000), -CLIP, CLIP)
    plugin, envelope = (
        log_moment_bounds(z, BETS, CLIP, bound, 0.025, 1, np.random.default_rng(0))
        for bound in ("plugin", "subexponential")
    )
    assert (envelope - plugin).min() == pytest.approx(0.0, abs=1e-15)
    curvature = envelope / BETS**2
    np.testing.assert_allclose(curvature, curvature[0], rtol=1e-14)


def test_bernstein_by_hand() -> None:
    values = np.array([0.0, 0.5, 1.0])
    expected = 0.5 + math.sqrt(2 * 0.25 * math.log(20) / 3) + 7 * math.log(20) / 6
    assert expected > 1
    assert empirical_bernstein_upper_bound(values, 0.1) == 1.0
    many = np.tile(values, 1000)
    variance = 2000 * 0.25 / 2999  # 2000 deviations of 1/2
    expected = 0.5 + math.sqrt(2 * variance * math.log(20) / 3000) + 7 * math.log(20) / (3 * 2999)
    assert empirical_bernstein_upper_bound(many, 0.1) == pytest.approx(expected, rel=1e-14)
