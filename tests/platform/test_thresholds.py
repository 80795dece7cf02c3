"""The edge that a bisection found, against scipy and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scipy import stats
from tests.platform.test_comparison import section, trial

from piste.ledger.tables import TrialRecord
from piste.space import Sweep
from piste.thresholds import clopper_pearson, thresholds


@pytest.mark.parametrize("n", range(1, 13))
def test_the_interval_of_a_fraction_is_scipys(n: int) -> None:
    for k in range(n + 1):
        peer = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
        assert clopper_pearson(k, n) == pytest.approx((peer.low, peer.high), abs=1e-12)


def bisected(probes: dict[float, list[bool]], name: str = "adamw") -> list[TrialRecord]:
    """Trials that converge (objective 1) or do not (NaN), probe by probe."""
    flat = [(value, seed, good) for value, seeds in probes.items() for seed, good in enumerate(seeds)]
    return [
        trial(n, 1.0 if good else math.nan, seed=seed, optimizer__lr=value, optimizer__name=name)
        for n, (value, seed, good) in enumerate(flat)
    ]


def bisection(entry: dict[str, Any]) -> Sweep:
    space = {"optimizer.name": {"grid": ["adamw", "reg"]}, "optimizer.lr": entry}
    return section(space, trials=None, searcher="bisect", bisect={"parameter": "optimizer.lr"})


def converged(record: TrialRecord) -> bool:
    return record.value == 1.0


YES, NO, MOST, HALF, FEW = [True] * 3, [False] * 3, [True, False, True], [True, False], [False, True, False]


@pytest.mark.parametrize(
    ("entry", "probes", "bracket", "threshold"),
    [
        ({"log_uniform": [1e-4, 1.0]}, {1e-4: YES, 1.0: NO, 1e-2: FEW, 1e-3: MOST}, (1e-3, 1e-2), 10**-2.5),
        ({"uniform": [0.0, 1.0]}, {0.0: YES, 1.0: NO, 0.5: YES, 0.75: NO}, (0.5, 0.75), 0.625),
        ({"uniform": [0.0, 1.0]}, {0.0: NO, 1.0: YES, 0.5: NO, 0.75: HALF}, (0.75, 0.5), 0.625),
        ({"int": [1, 9]}, {1: NO, 9: YES, 5: YES, 3: NO, 4: YES}, (4, 3), 3.5),
        ({"int": [1, 9]}, {1: YES, 3: NO, 5: YES, 9: NO}, (1, 3), 2.0),  # the first edge
        ({"int": [1, 9]}, {1: YES, 9: YES}, None, None),
        ({"int": [1, 9]}, {1: NO, 9: NO}, None, None),
    ],
)
def test_the_threshold_is_the_middle_of_the_bracket(
    entry: Any, probes: dict[float, list[bool]], bracket: tuple[float, float] | None, threshold: float | None
) -> None:
    trials = [
        *bisected(probes),
        trial(99, None, outcome=None, optimizer__lr=0.4, optimizer__name="adamw"),
    ]
    (found,) = thresholds(trials, bisection(entry), converged)
    assert found.values == {"optimizer.name": "adamw"}
    assert [p.value for p in found.probes] == sorted(probes)
    assert [(p.converged, p.n) for p in found.probes] == [
        (sum(probes[v]), len(probes[v])) for v in sorted(probes)
    ]
    assert (found.bracket and tuple(p.value for p in found.bracket)) == bracket
    assert found.threshold == (None if threshold is None else pytest.approx(threshold))


def test_every_stratum_has_its_threshold() -> None:
    entry = {"int": [1, 9]}
    trials = bisected({1: YES, 9: NO, 5: YES}) + bisected({1: YES, 9: NO, 5: NO}, "reg")
    found = {t.values["optimizer.name"]: t for t in thresholds(trials, bisection(entry), converged)}
    assert {name: t.threshold for name, t in found.items()} == {"adamw": 7.0, "reg": 3.0}
    bracket = found["reg"].bracket
    assert bracket is not None
    assert [(p.fraction, p.interval) for p in bracket] == [
        (1.0, (pytest.approx(0.025 ** (1 / 3)), 1.0)), (0.0, (0.0, pytest.approx(1.0 - 0.025 ** (1 / 3)))),
    ]  # fmt: skip
