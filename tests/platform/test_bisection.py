"""Bisections: every edge is found within the tolerance, in as many probes as the closed form says."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from piste.search import Known, bracketing, suggest
from piste.space import Sweep

FALSE_FAILURE = 1e-7  # of each statistical check


def section(space: dict[str, Any], **bisect: Any) -> Sweep:
    return Sweep.model_validate({"metric": "loss", "searcher": "bisect", "space": space, "bisect": bisect})


def bisected(
    entry: dict[str, Any], converges: Callable[[float], float], tolerance: float = 0.1
) -> tuple[list[float], tuple[float, float] | None]:
    """The probes of a bisection, and the bracket that they leave."""
    recipe = section({"x": entry}, parameter="x", tolerance=tolerance)
    known: list[Known] = []
    while (found := suggest(recipe, "key", len(known), known)) is not None:
        known.append(Known(len(known), found.values, None, "complete", converges(found.values["x"])))
        assert len(known) < 100
    return [k.values["x"] for k in known], bracketing(recipe, known)


def relative(bracket: tuple[float, float]) -> float:
    return (bracket[1] - bracket[0]) / max(abs(end) for end in bracket)


@pytest.mark.parametrize("below", [True, False])
@given(
    position=st.floats(1e-6, 1.0 - 1e-6),
    decades=st.floats(0.5, 8.0),
    tolerance=st.floats(1e-3, 0.5),
)
def test_a_log_uniform_edge_is_found_in_as_many_probes_as_halvings(
    below: bool, position: float, decades: float, tolerance: float
) -> None:
    low, high = 1e-3, 1e-3 * 10.0**decades
    edge = low * (high / low) ** position
    probes, bracket = bisected({"log_uniform": [low, high]}, lambda x: float((x < edge) == below), tolerance)
    assert bracket is not None
    assert bracket[0] <= edge <= bracket[1]
    assert relative(bracket) <= tolerance
    # each probe halves log(high / low), until 1 - exp(-log(high / low) / 2^n) <= tolerance
    halvings = math.ceil(math.log2(math.log(high / low) / -math.log1p(-tolerance)) - 1e-9)
    assert len(probes) == 2 + max(0, halvings)
    assert probes[:2] == [low, high]


@pytest.mark.parametrize("below", [True, False])
@given(edge=st.floats(1.01, 8.99), tolerance=st.floats(1e-3, 0.5))
def test_a_uniform_edge_is_found_within_the_closed_form(below: bool, edge: float, tolerance: float) -> None:
    probes, bracket = bisected({"uniform": [1.0, 9.0]}, lambda x: float((x < edge) == below), tolerance)
    assert bracket is not None
    assert bracket[0] <= edge <= bracket[1]
    assert relative(bracket) <= tolerance
    # 8 / 2^n <= tolerance high, with edge <= high < edge + 8 / 2^n
    fewest = math.log2(8.0 * (1.0 - tolerance) / (tolerance * edge))
    most = math.log2(8.0 / (tolerance * edge))
    assert 2 + math.ceil(fewest - 1e-9) <= len(probes) <= 2 + max(0, math.ceil(most + 1e-9))


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("edge", [2, 3, 100, 511, 777, 1024])
def test_a_batch_size_is_found_exactly(edge: int, below: bool) -> None:
    """`edge` is the first value on the other side; the bracket's ends are neighbours."""
    probes, bracket = bisected({"int": [1, 1024]}, lambda x: float((x < edge) == below), 1e-9)
    assert bracket == (edge - 1, edge)
    assert len(probes) <= 2 + math.ceil(math.log2(1023))
    assert all(isinstance(probe, int) for probe in probes)
    assert len(set(probes)) == len(probes)


def _below(edge: float, x: float) -> float:
    return float(x < edge)


def _at_one(fraction: float, x: float) -> float:
    return fraction if x == 1 else 0.0


@pytest.mark.parametrize("low", [-9, -4, -1, 0, 5])
@pytest.mark.parametrize("width", range(1, 12))
def test_every_integer_edge_is_found(low: int, width: int) -> None:
    for edge in range(low + 1, low + width + 1):
        _, bracket = bisected({"int": [low, low + width]}, partial(_below, edge), 1e-9)
        assert bracket == (edge - 1, edge)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
@pytest.mark.parametrize("entry", [{"uniform": [1, 2]}, {"log_uniform": [1, 2]}, {"int": [1, 2]}])
def test_without_an_edge_the_ends_alone_are_probed(entry: dict[str, Any], fraction: float) -> None:
    assert bisected(entry, lambda x: fraction) == ([1, 2], None)


def test_strata_have_an_edge_each_and_only_their_own_probes() -> None:
    edges = {"a": 0.02, "b": 0.5, "c": 5.0}
    recipe = section(
        {"name": {"grid": list(edges)}, "lr": {"log_uniform": [1e-3, 1.0]}},
        parameter="lr",
        tolerance=0.05,
    )
    for stratum, (name, edge) in enumerate(edges.items()):
        known: list[Known] = []
        while (found := suggest(recipe, "", cell := 3 * len(known) + stratum, known)) is not None:
            assert found.values["name"] == name
            known.append(Known(cell, found.values, None, "complete", float(found.values["lr"] < edge)))
        bracket = bracketing(recipe, known)
        if name == "c":
            assert (bracket, len(known)) == (None, 2)
        else:
            assert bracket is not None
            assert bracket[0] <= edge <= bracket[1]
            assert relative(bracket) <= 0.05


def test_noisy_seeds_decide_by_majority() -> None:
    """Seeds converge with probability 1 / (1 + (x / 0.1)^8): a fuzzy edge at 0.1.

    A probe a factor 2 away errs where 5 or fewer of 9 seeds are on the right side, each with probability
    1 / (1 + 2^8): at most C(9, 5) 257^-5 = 1.1e-10 a probe. So in 400 sweeps of 12 probes the threshold is
    outside [0.05, 0.2] with a probability below 1e-6.
    """
    generator = np.random.default_rng(0)

    def converges(x: float) -> float:
        return generator.binomial(9, 1.0 / (1.0 + (x / 0.1) ** 8)) / 9

    middles = []
    for _ in range(400):
        _, bracket = bisected({"log_uniform": [1e-3, 10.0]}, converges, 0.05)
        assert bracket is not None
        middles.append(math.sqrt(bracket[0] * bracket[1]))
    assert all(0.05 < middle < 0.2 for middle in middles)
    # symmetric in log x around the edge; a t-test of the mean
    assert stats.ttest_1samp(np.log(middles), math.log(0.1)).pvalue > FALSE_FAILURE


def test_half_of_the_seeds_are_enough() -> None:
    for fraction, edge in ((0.5, True), (0.49, False)):
        _, bracket = bisected({"uniform": [1, 2]}, partial(_at_one, fraction))
        assert (bracket is not None) == edge
