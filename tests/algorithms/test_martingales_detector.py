"""Detectors: the recursion against sums written out, any batching, exact states, bad input."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from online_cp.betting import FixedStrategy
from online_cp.martingale import CUSUMWrapper, ShiryaevRobertsWrapper
from online_cp.martingale import PluginMartingale as PeerPlugin
from tests.algorithms.score_laws import Array, gamma

from piste_algorithms.martingales import ConformalDetector, Cusum, ShiftDetector, ShiryaevRoberts, _kernel
from piste_algorithms.martingales.detector import Detector

BUILDERS: dict[str, Callable[..., Detector]] = {
    "harmonic": lambda **given: ShiftDetector(0.2, **given),
    "plain": lambda **given: ShiftDetector(0.2, onset="plain", **given),
    "two_sided": lambda **given: ShiftDetector(0.2, two_sided=True, **given),
    "familywise": lambda **given: ShiftDetector(0.2, familywise=True, **given),
    "conformal": lambda **given: ConformalDetector(0.2, **given),
    "cusum": lambda **given: Cusum(200.0, **given),
    "shiryaev_roberts": lambda **given: ShiryaevRoberts(200.0, **given),
}
CALIBRATION = gamma(np.random.default_rng(0), 600)
# A shift that all of them find several times, with a few events that are no numbers.
STREAM = gamma(np.random.default_rng(1), 400)
STREAM[100:250] += 1.5
STREAM[[7, 120, 399]] = [math.nan, math.inf, -math.inf]


def build(name: str, **given: Any) -> Any:
    detector: Any = BUILDERS[name](**given)
    detector.calibrate(CALIBRATION)
    return detector


def wealth_of(detector: Any) -> float:
    return float(detector.log_wealth if hasattr(type(detector), "log_wealth") else detector.log_statistic)


@pytest.mark.parametrize("name", sorted(BUILDERS))
@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_batching_gives_the_same_bits(name: str, cuts: list[int]) -> None:
    whole, parts = build(name), build(name)
    expected = whole.update_many(STREAM)
    assert len(expected) >= 2
    found = []
    for low, high in zip([0, *sorted(cuts)], [*sorted(cuts), len(STREAM)], strict=True):
        found += parts.update_many(STREAM[low:high])
    assert found == expected
    assert parts.state_dict() == whole.state_dict()


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_one_by_one_gives_the_same_bits(name: str) -> None:
    whole, single = build(name), build(name)
    expected = whole.update_many(STREAM)
    found = [alarm for score in STREAM.tolist() if (alarm := single.update(score)) is not None]
    assert found == expected
    assert single.state_dict() == whole.state_dict()


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_batch_that_ends_with_an_alarm_leaves_the_state_of_its_last_event(name: str) -> None:
    first = build(name).update_many(STREAM)[0]
    whole, single = build(name), build(name)
    whole.update_many(STREAM[: first.sequence + 1])
    for score in STREAM[: first.sequence + 1].tolist():
        single.update(score)
    assert whole.alarms == 1
    assert single.state_dict() == whole.state_dict()


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("cut", [0, 1, 150, 400])
def test_a_saved_state_continues_bit_for_bit(name: str, cut: int) -> None:
    whole, before = build(name), build(name)
    expected = whole.update_many(STREAM)
    found = before.update_many(STREAM[:cut])
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    for state in (torch.load(file), json.loads(json.dumps(before.state_dict()))):
        after: Any = BUILDERS[name]()
        after.load_state_dict(state)
        assert found + after.update_many(STREAM[cut:]) == expected
        assert after.state_dict() == whole.state_dict()


def test_a_state_of_other_settings_is_refused_with_the_difference() -> None:
    state = build("harmonic").state_dict()
    with pytest.raises(ValueError, match=r"false_alarm_rate=0\.2, this one has 0\.1"):
        ShiftDetector(0.1).load_state_dict(state)
    with pytest.raises(ValueError, match="kind='ShiftDetector', this one has 'Cusum'"):
        Cusum().load_state_dict({"settings": {**Cusum()._settings, "kind": "ShiftDetector"}})


# The recursion


def e_values(detector: Any, scores: Array) -> Array:
    """`(events, bets)`, from the detector's calibration."""
    state = detector.state_dict()
    z = (scores - state["calibration"]["mean"]) / state["calibration"]["scale"]
    growth: Array = np.exp(
        np.array(state["bets"]) * np.clip(z, -4, 4)[:, None] - np.array(state["log_bounds"])
    )
    return growth


@pytest.mark.parametrize("two_sided", [False, True])
def test_the_wealth_is_the_mixture_over_onsets_and_bets(two_sided: bool) -> None:
    detector = ShiftDetector(1e-9, two_sided=two_sided, smallest_shift=1.0)
    detector.calibrate(CALIBRATION)
    scores = gamma(np.random.default_rng(5), 60)
    e = e_values(detector, scores)
    for t, score in enumerate(scores.tolist(), 1):
        assert detector.update(score) is None
        # sum over onsets s of 1 / (s (s + 1)) times the product of the e-values since; later onsets hold 1
        mixture = sum(e[s - 1 : t].prod(axis=0) / (s * (s + 1)) for s in range(1, t + 1)) + 1 / (t + 1)
        assert detector.log_wealth == pytest.approx(math.log(float(np.mean(mixture))), abs=1e-11)


def test_the_other_statistics_are_sums_and_maxima_of_products() -> None:
    plain = ShiftDetector(1e-9, onset="plain", smallest_shift=1.0)
    cusum, roberts = Cusum(1e9), ShiryaevRoberts(1e9)
    scores = gamma(np.random.default_rng(6), 60)
    for detector in (plain, cusum, roberts):
        detector.calibrate(CALIBRATION)
    for t, score in enumerate(scores.tolist(), 1):
        for detector in (plain, cusum, roberts):
            assert detector.update(score) is None
        e = e_values(cusum, scores)
        products = np.array([e[s:t].prod(axis=0) for s in range(t)])
        wealth = e_values(plain, scores)[:t].prod(axis=0).mean()
        assert plain.log_wealth == pytest.approx(math.log(wealth), abs=1e-11)
        assert cusum.log_statistic == pytest.approx(math.log(products.max(axis=0).mean()), abs=1e-11)
        assert roberts.log_statistic == pytest.approx(math.log(products.sum(axis=0).mean()), abs=1e-11)


def test_cusum_and_shiryaev_roberts_are_those_of_online_cp() -> None:
    kappa = 0.5
    p_values = np.random.default_rng(7).beta(0.8, 1.0, size=300)

    def density(p: float) -> float:
        return float(kappa * p ** (kappa - 1))

    strategy = FixedStrategy(pdf=density, check_integration=False)  # type: ignore[no-untyped-call]
    cusum = CUSUMWrapper(PeerPlugin(strategy))  # type: ignore[no-untyped-call]
    roberts = ShiryaevRobertsWrapper(PeerPlugin(strategy))  # type: ignore[no-untyped-call]
    sides = [
        (_kernel.RESTARTED_MAX, np.full(1, -math.inf)),
        (_kernel.RESTARTED_SUM, np.full(1, -math.inf)),
    ]
    bets, bounds = np.array([kappa - 1]), np.array([-math.log(kappa)])
    work = np.zeros(1), np.zeros(1, dtype=np.int64)
    for t, p in enumerate(p_values):
        for peer in (cusum, roberts):
            peer.update(float(p))
        evidence = np.array([math.log(p)])
        values = [
            _kernel.advance(evidence, 0, t, t, rule, 1e9, bets, bounds, state, *work)[3]
            for rule, state in sides
        ]
        # The peer's CUSUM is S_n / min_{i <= n} S_i, which is at least 1: max(C_n, 1).
        assert max(values[0], 0.0) == pytest.approx(float(cusum._log_gamma_values[-1]), abs=1e-9)
        assert math.exp(values[1]) == pytest.approx(float(roberts._sr_values[-1]), rel=1e-9)


def test_a_long_loss_and_a_huge_threshold_stay_in_range() -> None:
    detector = ShiftDetector(1e-300, onset="plain", smallest_shift=3.0)
    detector.calibrate(CALIBRATION)
    assert detector.update_many(np.full(200_000, -1e300)) == []
    assert detector.log_wealth == pytest.approx(200_000 * -(0.4 + detector._log_bounds[0]), rel=1e-3)
    assert detector.log_wealth < -10_000  # exp of it is 0
    cusum = Cusum(1e300, smallest_shift=3.0)
    cusum.calibrate(CALIBRATION)
    (alarm, *_) = cusum.update_many(np.full(1000, 1e300))
    assert alarm.log_wealth >= 300 * math.log(10)


def test_the_onset_is_where_the_shift_began() -> None:
    errors = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        detector = ShiftDetector()
        detector.calibrate(gamma(generator, 2000))
        scores = gamma(generator, 1000)
        scores[300:] += 1.0
        (alarm, *_) = detector.update_many(scores)
        errors.append(alarm.onset - 300)
        assert alarm.onset <= alarm.sequence
    assert abs(float(np.median(errors))) <= 5
    assert np.mean(np.abs(errors) <= 25) >= 0.8


def test_familywise_thresholds_spend_the_rate_once() -> None:
    detector = build("familywise")
    alarms = detector.update_many(np.tile(STREAM[100:250], 10))
    thresholds = [math.exp(alarm.log_threshold) for alarm in alarms]
    assert [alarm.segment for alarm in alarms] == list(range(1, len(alarms) + 1))
    for k, threshold in enumerate(thresholds, 1):
        assert 0.1 / threshold == pytest.approx(0.1 * 0.1 / (k * (k + 1)))
    assert len(thresholds) > 5


# Bad input


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_scores_that_are_no_numbers_change_nothing_but_counts(name: str) -> None:
    clean, dirty = build(name), build(name)
    scores = STREAM[np.isfinite(STREAM)]
    positions = np.arange(len(scores))
    holes = np.insert(
        scores, [0, 50, 50, 200, len(scores)], [math.nan, math.inf, -math.inf, math.nan, math.nan]
    )
    where = np.insert(positions, [0, 50, 50, 200, len(scores)], -1)
    expected, found = clean.update_many(scores), dirty.update_many(holes)
    assert [alarm.log_wealth for alarm in found] == [alarm.log_wealth for alarm in expected]
    assert [where[alarm.sequence] for alarm in found] == [alarm.sequence for alarm in expected]
    assert wealth_of(dirty) == wealth_of(clean)
    assert (dirty.skipped, dirty.sequence) == (5, len(holes))
    assert clean.skipped == 0
    only_holes = dirty.state_dict()
    assert dirty.update(math.nan) is None
    assert dirty.state_dict() == {**only_holes, "skipped": 6, "sequence": len(holes) + 1}


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_the_policy_to_raise_leaves_the_state_as_it_was(name: str) -> None:
    detector = build(name, non_finite="raise")
    detector.update_many(STREAM[:5])
    before = detector.state_dict()
    with pytest.raises(ValueError, match="scores must be finite, got nan at index 2"):
        detector.update_many(STREAM[5:])
    assert detector.state_dict() == before
    with pytest.raises(ValueError, match="scores must be finite, got inf at index 1"):
        detector.calibrate([0.0, math.inf])


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_too_few_calibration_points_are_refused_with_the_number_needed(name: str) -> None:
    detector: Any = BUILDERS[name]()
    needed = detector.calibration_points
    with pytest.raises(ValueError, match=f"at least {needed} finite calibration points .*, got {needed - 1}"):
        detector.calibrate([*gamma(np.random.default_rng(0), needed - 1), math.nan])
    with pytest.raises(RuntimeError, match="not calibrated"):
        detector.update(0.0)
    with pytest.raises(RuntimeError, match="not calibrated"):
        detector.state_dict()
    with pytest.raises(RuntimeError, match="not calibrated"):
        wealth_of(detector)
    detector.calibrate(gamma(np.random.default_rng(0), needed))
    detector.update_many(np.full(2000, 6.0))
    assert detector.alarms > 0  # the number is enough to find something


def test_a_stricter_level_needs_more_points() -> None:
    needed = [ShiftDetector(rate).calibration_points for rate in (0.1, 0.05, 1e-3, 1e-6)]
    assert needed == sorted(set(needed))
    assert needed[1] <= 500
    assert ShiftDetector(0.05, smallest_shift=0.5).calibration_points < needed[1] / 3
    needed = [ConformalDetector(rate).calibration_points for rate in (0.1, 0.05, 1e-3, 1e-6)]
    assert needed == sorted(set(needed))
    assert needed[1] <= 500


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ShiftDetector(0.0), r"false_alarm_rate must be a number in \(0, 1\), got 0\.0"),
        (lambda: ShiftDetector(1.0), "false_alarm_rate"),
        (lambda: ShiftDetector(bound="exact"), "bound must be one of 'wsr', 'bootstrap'"),
        (lambda: ShiftDetector(onset="now"), "onset must be one of 'harmonic', 'plain', got 'now'"),
        (lambda: ShiftDetector(two_sided=cast("bool", 1)), "two_sided must be True or False, got 1"),
        (lambda: ShiftDetector(bets=()), "bets must be a sequence"),
        (lambda: ShiftDetector(bets=(0.1, -0.5)), r"bets\[1\] must be a number"),
        (lambda: ShiftDetector(clip=0.0), "clip must be"),
        (lambda: ShiftDetector(smallest_shift=0.0), "smallest_shift must be"),
        (lambda: ShiftDetector(non_finite="zero"), "non_finite must be one of 'skip', 'raise'"),
        (lambda: ShiftDetector(1e-3, bound="bootstrap"), "resamples must be at least 8000 .*, got 200"),
        (lambda: ConformalDetector(2.0), "false_alarm_rate must be"),
        (lambda: ConformalDetector(smallest_p_value=1.0), "smallest_p_value must be"),
        (lambda: Cusum(0.5), r"average_run_length must be a number in \[1, inf\), got 0\.5"),
        (lambda: ShiryaevRoberts(calibration_error=0.0), "calibration_error must be"),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_scores_are_named() -> None:
    detector = build("harmonic")
    with pytest.raises(ValueError, match=r"scores must be a vector of numbers, got the shape \(2, 3\)"):
        detector.update_many(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="scores must be a vector of numbers"):
        detector.update_many(["a", "b"])
    with pytest.raises(ValueError, match="scores must be a vector of numbers"):
        detector.update(cast("float", "a"))
    with pytest.raises(ValueError, match="scores must vary"):
        detector.calibrate(np.ones(1000))


def test_vectors_of_every_kind_are_the_same_events() -> None:
    scores = STREAM[:50].astype(np.float32)
    states = []
    read_only = scores.astype(np.float64)
    read_only.setflags(write=False)
    kinds: list[Any] = [scores, torch.from_numpy(scores), scores.tolist(), iter(scores.tolist()), read_only]
    for kind in [*kinds, np.repeat(read_only, 2)[::2], torch.from_numpy(scores).requires_grad_()]:
        detector = build("harmonic")
        detector.update_many(kind)
        states.append(detector.state_dict())
    assert all(state == states[0] for state in states)
    assert detector.update_many([]) == []
    assert detector.state_dict() == states[0]
