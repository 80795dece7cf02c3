"""What the detectors promise, over many streams of fixed seeds; bounds of counts fail once in ten million."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tests.algorithms.score_laws import LAWS, Law, fewest_successes, gamma, most_successes

from piste_algorithms.martingales import (
    ConformalDetector,
    Cusum,
    ShiftDetector,
    ShiryaevRoberts,
    expected_delay,
)


def false_alarms(build: Callable[[], Any], law: Law, n: int, streams: int, length: int, seed: int = 0) -> int:
    """How many null streams raise an alarm, each with a calibration sample of its own."""
    count = 0
    for stream in range(streams):
        generator = np.random.default_rng([seed, stream])
        detector = build()
        detector.calibrate(law(generator, n))
        count += bool(detector.update_many(law(generator, length)))
    return count


BUILDERS: dict[str, Callable[[], Any]] = {
    "wsr": lambda: ShiftDetector(),
    "wsr plain": lambda: ShiftDetector(onset="plain"),
    "wsr two-sided": lambda: ShiftDetector(two_sided=True),
    "wsr familywise": lambda: ShiftDetector(familywise=True),
    "bernstein": lambda: ShiftDetector(bound="empirical_bernstein"),
    "conformal": lambda: ConformalDetector(),
}


@pytest.mark.parametrize("law", sorted(LAWS))
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_streams_without_a_shift_are_left_alone(name: str, law: str) -> None:
    streams = 60
    count = false_alarms(BUILDERS[name], LAWS[law], 500, streams, 4000)
    assert count <= most_successes(streams, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("law", sorted(LAWS))
@pytest.mark.parametrize("n", [500, 2000])
@pytest.mark.parametrize("bound", ["wsr", "bootstrap"])
def test_two_thousand_streams_without_a_shift(bound: str, n: int, law: str) -> None:
    streams = 2000
    count = false_alarms(lambda: ShiftDetector(bound=bound), LAWS[law], n, streams, 10_000, seed=1)
    assert count <= streams * (0.05 + 3 * math.sqrt(0.05 * 0.95 / streams))


def test_the_plugin_bound_breaks_the_level() -> None:
    streams = 200
    unsafe = false_alarms(lambda: ShiftDetector(bound="plugin", onset="plain"), gamma, 500, streams, 10_000)
    # A rate of 15 %, three times what was asked for, would give so few once in ten million.
    assert unsafe >= fewest_successes(streams, 0.15)
    assert unsafe > most_successes(streams, 0.05)


def delays(build: Callable[[], Any], shift: float, onset: int, streams: int, law: Law = gamma) -> list[float]:
    """Events from the onset to the first alarm at or after it, of streams without an alarm before."""
    found = []
    for stream in range(streams):
        generator = np.random.default_rng([7, stream])
        detector = build()
        detector.calibrate(law(generator, 2000))
        scores = law(generator, onset + 6000)
        scores[onset:] += shift
        alarms = detector.update_many(scores)
        assert alarms, "no shift was found"
        if alarms[0].sequence >= onset:
            found.append(alarms[0].sequence - onset + 1.0)
    return found


@pytest.mark.parametrize("shift", [0.5, 1.0])
def test_the_delay_is_near_its_bound(shift: float) -> None:
    before = gamma(np.random.default_rng(0), 200_000)
    _, predicted = expected_delay(before, before + shift, 0.05)
    found = delays(ShiftDetector, shift, 0, 60)
    assert len(found) == 60
    assert np.mean(found) <= 2.6 * predicted
    # No test of this level is faster on the mean than Wald's bound, half of which is far below it.
    assert np.mean(found) >= 0.5 * predicted


@pytest.mark.parametrize(("shift", "ratio"), [(0.5, 0.6), (1.0, 0.4)])
def test_a_late_shift_is_found_sooner_than_by_the_plain_martingale(shift: float, ratio: float) -> None:
    harmonic = np.mean(delays(ShiftDetector, shift, 1000, 40))
    plain = np.mean(delays(lambda: ShiftDetector(onset="plain"), shift, 1000, 40))
    assert harmonic <= ratio * plain


@pytest.mark.slow
def test_the_delay_grows_with_the_logarithm_of_the_level() -> None:
    rates = [10.0**-k for k in range(1, 7)]
    means = []
    for rate in rates:
        build = functools.partial(ShiftDetector, rate, smallest_shift=0.5)
        means.append(np.mean(delays(build, 1.0, 0, 300)))
    fit = stats.linregress([math.log(1 / rate) for rate in rates], means)
    assert fit.rvalue**2 >= 0.99


def test_a_shift_to_smaller_scores_needs_both_sides() -> None:
    generator = np.random.default_rng(2)
    calibration = gamma(generator, 2000)
    scores = gamma(generator, 2000) - 0.6
    one, both = ShiftDetector(), ShiftDetector(two_sided=True)
    for detector in (one, both):
        detector.calibrate(calibration)
    assert one.update_many(scores) == []
    assert both.update_many(scores)[0].bet < 0


@pytest.mark.parametrize("build", [Cusum, ShiryaevRoberts])
def test_false_alarms_are_as_far_apart_as_asked(build: Callable[..., Any]) -> None:
    detector = build(100.0)
    generator = np.random.default_rng(3)
    detector.calibrate(gamma(generator, 20_000))
    alarms = detector.update_many(gamma(generator, 2_000_000))
    gaps = np.diff([-1, *(alarm.sequence for alarm in alarms)])
    assert len(gaps) > 500
    # The mean is at least 100; it is measured within 5.2 standard errors.
    assert gaps.mean() >= 100 - 5.2 * gaps.std() / math.sqrt(len(gaps))


# The predicted delay


@pytest.mark.parametrize("shift", [0.25, 0.5, 1.0])
def test_the_gain_of_a_gaussian_shift_is_its_divergence(shift: float) -> None:
    null = np.asarray(stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000))
    gain, delay = expected_delay(null, null + shift, 0.05, clip=40.0)
    # KL(N(d, 1) || N(0, 1)) = d^2 / 2
    assert gain == pytest.approx(shift**2 / 2, rel=2e-3)
    assert delay == pytest.approx(math.log(40) / gain, rel=1e-12)


def test_a_gain_is_found_wherever_the_scores_lie() -> None:
    null = gamma(np.random.default_rng(0), 1000)
    assert expected_delay(5 + 3 * null, 5 + 3 * (null + 0.7), 0.01) == pytest.approx(
        expected_delay(null, null + 0.7, 0.01)
    )
    assert expected_delay(null, null - 0.5, 0.01) == (0.0, math.inf)
    assert expected_delay(null, null, 0.01) == (0.0, math.inf)
    gain, delay = expected_delay(null, null + 1e6, 0.01)
    assert math.isfinite(gain)
    assert delay == pytest.approx(math.log(200) / gain)
    assert gain > expected_delay(null, null + 1.0, 0.01)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 1.0], [2.0], 0.05), "scores_before must vary"),
        (([1.0, 2.0], [], 0.05), "scores_after hold at least one"),
        (([1.0, math.nan], [2.0], 0.05), "scores_before must be finite"),
        (([1.0, 2.0], [2.0], 0.0), "false_alarm_rate must be"),
    ],
)
def test_bad_samples_are_named(arguments: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_delay(*arguments)
