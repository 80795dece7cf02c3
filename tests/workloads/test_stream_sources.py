"""Simulated streams: the same events from any sequence number, of the law that is promised."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from piste_workloads.stream import Config, open_source
from piste_workloads.stream.config import SIMULATED, Source
from piste_workloads.stream.simulated import calibration, samples

every_law = pytest.mark.parametrize("law", SIMULATED)
FROZEN = {"gamma": stats.gamma(2.0), "gaussian": stats.norm(), "lognormal": stats.lognorm(1.0)}


def config(law: str, seed: int = 0, **source: float | int) -> Config:
    return Config(seed=seed, source=Source.model_validate({"name": law, **source}))


@every_law
@given(cuts=st.lists(st.integers(0, 2600), max_size=6))
def test_a_source_reads_the_same_from_any_number_on(law: str, cuts: list[int]) -> None:
    made = config(law, events=2500, shift=0.7, onset=1200)
    whole = open_source(made, [3]).read(0, 2500)[3]
    assert len(whole) == 2500
    source = open_source(made, [3, 1])
    for first, second in itertools.pairwise(cuts):  # there and back again
        count = abs(second - first)
        np.testing.assert_array_equal(source.read(first, count)[3], whole[first : first + count])


@every_law
def test_streams_and_seeds_and_calibrations_are_drawn_apart(law: str) -> None:
    made = config(law, events=500, calibration=500)
    drawn = [open_source(made, [n]).read(0, 500)[n] for n in (0, 1)]
    drawn += [calibration(made, n) for n in (0, 1)]
    drawn += [open_source(config(law, seed=1, events=500), [0]).read(0, 500)[0]]
    for index, one in enumerate(drawn):
        for other in drawn[:index]:
            assert not np.isin(one, other).any()


@pytest.mark.parametrize("law", FROZEN)
def test_scores_follow_their_law_and_a_shift_moves_them_by_its_standard_deviation(law: str) -> None:
    frozen = FROZEN[law]
    made = config(law, events=40_000, shift=0.5, onset=20_000, calibration=20_000)
    scores = open_source(made, [0]).read(0, 40_000)[0]
    moved = scores[20_000:] - 0.5 * frozen.std()
    for sample in (scores[:20_000], moved, calibration(made, 0), samples(made, 20_000)[0]):
        assert stats.kstest(sample, frozen.cdf).pvalue > 1e-4
    # lognormal scores are so heavy-tailed that a comparison of means would say little
    assert stats.ks_2samp(scores[:20_000], scores[20_000:]).pvalue < 1e-12
    before, after = samples(made, 1000)
    assert np.median(after) - np.median(before) == pytest.approx(0.5 * frozen.std(), abs=0.2 * frozen.std())


def test_autoregressive_scores_are_stationary_and_as_dependent_as_they_are_to_be() -> None:
    made = config("autoregressive", events=100_000, correlation=0.6)
    scores = open_source(made, [0]).read(0, 100_000)[0]
    lagged = [float(np.corrcoef(scores[k:], scores[:-k])[0, 1]) for k in (1, 2)]
    assert lagged == pytest.approx([0.6, 0.36], abs=0.02)
    assert scores.std() == pytest.approx(1.0, abs=0.02)
    # the effective number of independent ones is (1 - r) / (1 + r) of them
    assert abs(scores.mean()) < 4 / np.sqrt(100_000 * 0.25)
    first = [
        open_source(config("autoregressive", seed=s, correlation=0.6), [0]).read(0, 1)[0][0]
        for s in range(400)
    ]
    assert np.std(first) == pytest.approx(1.0, abs=0.15)  # stationary from the first event on


def test_a_source_ends_with_its_events() -> None:
    source = open_source(config("gamma", events=10), [0])
    assert [len(source.read(first, 4)[0]) for first in (0, 8, 10, 12)] == [4, 2, 0, 0]
