"""Calibration-conditional p-values: their levels, what they are free of, and why the plain ones do not do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from tests.algorithms.score_laws import fewest_successes, gamma, most_successes

from piste_algorithms.martingales import ConformalDetector
from piste_algorithms.martingales.conformal import calibration_levels


@pytest.mark.parametrize("n", [1, 2, 300, 3000])
@pytest.mark.parametrize("error", [0.3, 0.025, 1e-8])
def test_levels_are_quantiles_of_beta_laws(n: int, error: float) -> None:
    levels = calibration_levels(n, error)
    ranks = np.arange(n)
    shares = (ranks + 1.0) ** -2
    expected = stats.beta.isf(error * shares / shares.sum(), ranks + 1, n - ranks)
    np.testing.assert_allclose(levels[:-1], expected, rtol=1e-9)
    assert levels[-1] == 1.0
    assert (np.diff(levels) >= 0).all()


def test_no_level_is_too_low_more_often_than_asked() -> None:
    # Uniform scores: the probability of a score above the one of rank j from the top is known exactly.
    generator = np.random.default_rng(0)
    n, draws, error = 300, 2000, 0.2
    levels = calibration_levels(n, error)[:-1]
    true = 1 - np.sort(generator.random((draws, n)), axis=1)[:, ::-1]
    failed = (true > levels).any(axis=1).sum()
    assert failed <= most_successes(draws, error)
    plain = (np.arange(n) + 1) / (n + 1)
    assert (true > plain).any(axis=1).sum() >= fewest_successes(draws, 0.9)


def test_it_is_free_of_the_law() -> None:
    generator = np.random.default_rng(1)
    calibration, scores = gamma(generator, 500), gamma(generator, 500)
    scores[200:] += 1.5
    states, alarms = [], []
    for change in (np.exp, np.cbrt, lambda x: 1e6 + 2 * x):
        detector = ConformalDetector()
        detector.calibrate(change(calibration))
        alarms.append(detector.update_many(change(scores)))
        states.append(detector.log_wealth)
    assert alarms[0]
    assert alarms[0] == alarms[1] == alarms[2]
    assert states[0] == states[1] == states[2]


def test_ties_count_against_a_shift() -> None:
    detector = ConformalDetector()
    detector.calibrate(np.arange(500) % 5)
    levels = calibration_levels(500, 0.025)
    p_values = detector.p_values([5.0, 4.0, 3.5, 0.0, -1.0, math.nan])
    np.testing.assert_allclose(p_values[:-1], levels[[0, 100, 100, 500, 500]], rtol=1e-14)
    assert math.isnan(p_values[-1])
    assert detector.update_many(np.arange(10_000) % 5) == []


def test_a_shift_is_found_without_any_law() -> None:
    found = []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        detector = ConformalDetector()
        detector.calibrate(generator.standard_cauchy(2000))  # no mean, no variance
        scores = generator.standard_cauchy(3000)
        scores[500:] = np.abs(scores[500:]) + 1
        alarms = detector.update_many(scores)
        found.append(alarms[0].sequence - 500)
    assert min(found) >= 0
    assert np.mean(found) < 100
