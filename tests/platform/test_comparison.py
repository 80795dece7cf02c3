"""Statistics of a sweep, against scipy, closed forms, brute force and simulated sweeps."""

from __future__ import annotations

import gc
import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from piste.comparison import (
    Cell,
    against_baseline,
    baselines,
    best_so_far,
    cells,
    equal_budgets,
    holm,
    importances,
    paired,
    times_to_target,
    tuning,
    unranked,
)
from piste.ledger.tables import TrialRecord
from piste.space import Sweep

FALSE_FAILURE = 1e-7  # of each statistical check
OPTIMIZERS = {"optimizer.name": {"choice": ["adamw", "muon", "reg", "sgd"]}}


def section(space: dict[str, Any] | None = None, **table: Any) -> Sweep:
    given = {"metric": "valid/loss", "trials": 1, "space": OPTIMIZERS if space is None else space}
    return Sweep.model_validate(given | table)


def trial(
    number: int,
    value: float | None,
    *,
    cell: int | None = None,
    seed: int = 0,
    outcome: str | None = "finished",
    seconds: float = 1.0,
    **values: Any,
) -> TrialRecord:
    """A trial; `optimizer__lr=0.1` is the value of `optimizer.lr`."""
    return TrialRecord(
        number=number,
        cell=number if cell is None else cell,
        seed=seed,
        values={key.replace("__", "."): chosen for key, chosen in values.items()},
        memory=None,
        run_id=f"run-{number}",
        reused=False,
        outcome=outcome,
        value=value,
        step=None,
        status="finished",
        error=None,
        created=0.0,
        finished=1.0,
        seconds=seconds,
    )


def cell(number: int, values: list[float], name: str = "adamw", failed: int = 0, pruned: int = 0) -> Cell:
    return Cell(number, {"optimizer.name": name}, dict(enumerate(values)), failed, pruned, 1.0)


def at_most(probability: float, tries: int) -> int:
    """What a count of events of at most this probability does not exceed, but with FALSE_FAILURE."""
    return int(stats.binom.isf(FALSE_FAILURE, tries, probability))


# -- cells


def test_a_cell_counts_each_outcome_once() -> None:
    outcomes = [
        ("finished", 1.0), ("finished", 3.0), ("finished", math.nan), ("finished", -math.inf),
        ("finished", None), ("failed", None), ("failed", 0.5), ("pruned", 0.1), (None, None),
    ]  # fmt: skip
    trials = [
        trial(n, value, cell=4, seed=n, outcome=outcome, seconds=2.0)
        for n, (outcome, value) in enumerate(outcomes)
    ]
    (found,) = cells(trials, "min")
    assert (found.number, found.by_seed, found.n, found.mean) == (4, {0: 1.0, 1: 3.0}, 2, 2.0)
    assert (found.failed, found.pruned, found.ended, found.seconds) == (5, 1, 8, 18.0)


@pytest.mark.parametrize(("mode", "order"), [("min", [1, 0, 2, 3, 5, 4]), ("max", [0, 1, 3, 2, 5, 4])])
def test_a_cell_that_lost_a_seed_ranks_behind(mode: Any, order: list[int]) -> None:
    trials = [
        trial(0, 5.0, cell=0), trial(1, None, cell=0, seed=1, outcome=None),
        trial(2, 4.0, cell=1), trial(3, 4.5, cell=1, seed=1),
        trial(4, 1.0, cell=2), trial(5, math.nan, cell=2, seed=1),
        trial(6, 9.0, cell=3), trial(7, 0.0, cell=3, seed=1, outcome="pruned"),
        trial(8, None, cell=4, outcome="failed"), trial(9, None, cell=5, outcome=None),
    ]  # fmt: skip
    assert [c.number for c in cells(trials, mode)] == order
    assert [math.isnan(c.mean) for c in cells(trials, mode)] == [False] * 4 + [True] * 2


def test_means_and_differences_of_the_largest_numbers_do_not_overflow() -> None:
    a, b = cell(0, [1.7e308, 1.6e308, 1.5e308]), cell(1, [1.0, 2.0, 3.0])
    assert a.mean == pytest.approx(1.6e308)
    found = paired(a, b)
    assert found.difference == pytest.approx(1.6e308)
    # d = (1.7, 1.6, 1.5) 10^308: t = 1.6 / (0.1 / sqrt 3)
    assert found.p == pytest.approx(2 * stats.t.sf(1.6 / (0.1 / math.sqrt(3)), 2))
    assert paired(a, cell(1, [-1.7e308] * 3)).p is None  # the difference itself is no number


# -- the bootstrap


def test_the_bootstrap_interval_of_few_seeds() -> None:
    assert cell(0, [1.0]).interval is None
    assert cell(0, []).interval is None
    # 1/27 of all resamples of three are three times the smallest: more than 2.5 %
    assert cell(0, [3.0, 1.0, 2.0]).interval == (1.0, 3.0)
    assert cell(0, [2.0, 2.0, 2.0]).interval == pytest.approx((2.0, 2.0))


@pytest.mark.parametrize("n", [4, 5, 8, 20])
def test_the_bootstrap_interval_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).gamma(2.0, size=n)
    draws = 200_000
    peer = stats.bootstrap(
        (values,), np.mean, n_resamples=draws, batch=10_000, method="percentile",
        rng=np.random.default_rng(1),
    )  # fmt: skip
    found = cell(0, values.tolist()).interval
    assert found is not None
    means = np.sort(peer.bootstrap_distribution)
    # 10,000 draws: the tail of 2.5 % is drawn with a standard error of 0.16 %, six of which are 1 %
    for end, tail in zip(found, (0.025, 0.975), strict=True):
        assert means[int(max(0.0, tail - 0.01) * draws)] <= end + 1e-12
        assert end - 1e-12 <= means[int(min(1.0, tail + 0.01) * draws) - 1]


@pytest.mark.parametrize(("n", "coverage"), [(2, 0.5), (3, 0.75)])
def test_the_bootstrap_interval_covers_as_its_docstring_says(n: int, coverage: float) -> None:
    generator, tries = np.random.default_rng(0), 4000
    covered = 0
    for _ in range(tries):
        interval = cell(0, generator.normal(size=n).tolist()).interval
        assert interval is not None
        covered += interval[0] <= 0.0 <= interval[1]
    # the range of n symmetric values covers their centre with 1 - 2^(1 - n)
    assert stats.binomtest(covered, tries, coverage).pvalue > FALSE_FAILURE


# -- the paired test


numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12))
def test_the_paired_test_is_scipys(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(column) for column in zip(*pairs, strict=True))
    assume(len({round(x - y, 3) for x, y in pairs}) > 1)
    found = paired(cell(0, a), cell(1, b))
    peer = stats.ttest_rel(a, b)
    low, high = peer.confidence_interval(0.95)
    assert found.n == len(pairs)
    assert found.p == pytest.approx(peer.pvalue, rel=1e-6, abs=1e-12)
    assert found.interval == pytest.approx((low, high), rel=1e-6, abs=1e-9)
    assert found.difference == pytest.approx(np.mean(np.subtract(a, b)), rel=1e-9, abs=1e-9)


def test_the_paired_test_takes_common_seeds_alone() -> None:
    a = Cell(0, {}, {3: 5.0, 0: 1.0, 1: 2.0}, 0, 0, 1.0)
    b = Cell(1, {}, {1: 1.5, 2: 100.0, 0: 0.0}, 0, 0, 1.0)
    found = paired(a, b)
    assert (found.n, found.difference) == (2, 0.75)
    assert found.p == pytest.approx(stats.ttest_rel([1.0, 2.0], [0.0, 1.5]).pvalue)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([], [], (0, None, None, None)),
        ([1.0], [3.0], (1, -2.0, None, None)),
        ([1.0, 1.0], [1.0, 1.0], (2, 0.0, (0.0, 0.0), 1.0)),  # nothing differs
        ([1.0, 1.0], [3.0, 3.0], (2, -2.0, (-2.0, -2.0), 0.0)),  # the seed does nothing
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], (3, 0.0, None, 1.0)),
        ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], (3, -1.0, None, 0.25)),  # a sign test of three
    ],
)
def test_the_paired_test_without_variance(a: list[float], b: list[float], expected: Any) -> None:
    assert paired(cell(0, a), cell(1, b)) == expected


def test_differences_that_only_rounding_tells_apart_are_the_same() -> None:
    a, b = [0.1 + 0.2, 0.3 + 0.4, 1.1 + 2.2], [0.2, 0.6, 3.2]
    assert len({x - y for x, y in zip(a, b, strict=True)}) == 3
    assert paired(cell(0, a), cell(1, b)).p == 0.25


# -- many comparisons


@given(st.lists(st.floats(0.0, 1.0), max_size=6), st.integers(0, 3))
def test_holm_is_the_closed_test_of_bonferroni(p: list[float], more: int) -> None:
    padded = [*p, *[1.0] * more]
    subsets = [s for k in range(1, len(padded) + 1) for s in itertools.combinations(range(len(padded)), k)]
    expected = [
        max(min(1.0, len(s) * min(padded[j] for j in s)) for s in subsets if i in s) for i in range(len(p))
    ]
    assert holm(p, len(padded)) == pytest.approx(expected)


def test_holm_of_an_example() -> None:
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize(
    ("groups", "cells_each", "n", "baseline"),
    [(4, 1, 10, {}), (4, 1, 3, {}), (2, 6, 5, {}), (2, 6, 5, {"optimizer.name": "adamw"})],
)
def test_equally_tuned_groups_that_do_not_differ_are_rarely_told_apart(
    groups: int, cells_each: int, n: int, baseline: dict[str, str]
) -> None:
    generator, tries, wrong = np.random.default_rng(0), 2000, 0
    names = ["adamw", "muon", "reg", "sgd"][:groups] * cells_each
    for _ in range(tries):
        made = [cell(i, generator.normal(size=n).tolist(), name) for i, name in enumerate(names)]
        made.sort(key=lambda c: c.mean)
        found = against_baseline(made, section(baseline=baseline), level=0.05)
        wrong += any(c.verdict in ("better", "worse") for c in found)
    assert wrong <= at_most(0.05, tries)


@pytest.mark.parametrize(("mode", "verdict"), [("min", "worse"), ("max", "better")])
def test_a_real_difference_is_found(mode: Any, verdict: str) -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(2, 5))
    trials = [
        trial(5 * c + s, 100.0 * c + noise[c, s], cell=c, seed=s, optimizer__name=name)
        for c, name in enumerate(["adamw", "reg"])
        for s in range(5)
    ]
    recipe = section(mode=mode, baseline={"optimizer.name": "adamw"})
    (found,) = against_baseline(cells(trials, mode), recipe)
    assert (found.cell.values["optimizer.name"], found.verdict) == ("reg", verdict)
    assert found.p == found.paired.p  # one comparison


def test_where_nothing_is_found_the_verdict_says_at_which_n() -> None:
    made = [cell(0, [1.0, 2.0, 3.0], "reg"), cell(1, [2.0, 1.0, 3.5], "adamw"), cell(2, [9.0], "muon")]
    verdicts = {c.cell.number: c.verdict for c in against_baseline(made, section())}
    assert verdicts == {1: "no difference found at n=3", 2: "no difference found at n=1"}


def test_a_cell_that_lost_a_seed_is_never_better() -> None:
    base = cell(0, [100.0 + 0.1 * s for s in range(5)])
    others = [
        cell(1, [1.0, 1.1, 1.3, 1.2], "reg", failed=1),
        cell(2, [1.0, 1.1, 1.3, 1.2], "muon", pruned=1),
        cell(3, [900.0, 901.0, 905.0, 903.0], "sgd", failed=1),
    ]
    found = against_baseline([base, *others], section(baseline={"optimizer.name": "adamw"}))
    assert [c.verdict for c in found] == ["failed", "pruned", "worse"]


def test_the_baseline_is_found_by_its_values() -> None:
    space = {
        "optimizer.betas": {"choice": [[0.9, 0.95], [0.9, 0.999]]},
        "train.steps": 60,
        "seed": {"repeats": 2},
    }
    recipe = section(space, trials=2, baseline={"optimizer.betas": [0.9, 0.999], "train.steps": 60})
    made = [
        Cell(n, {"optimizer.betas": b}, {0: n}, 0, 0, 1.0) for n, b in enumerate([[0.9, 0.95], [0.9, 0.999]])
    ]
    assert [c.number for c in baselines(made, recipe)] == [1]
    other = recipe.model_copy(update={"baseline": {"train.steps": 61}})
    assert against_baseline(made, other) == []
    lost = [cell(0, [1.0], "reg"), cell(1, [], "adamw", failed=3)]
    assert against_baseline(lost, section(baseline={"optimizer.name": "adamw"})) == []
    assert against_baseline([], section()) == []


# -- tuning


def unbalanced() -> list[TrialRecord]:
    """adamw has cells 0, 2, 3, 5 of two seeds, reg 1 and 4 of two seeds; one more of each is open."""
    names = ["adamw", "reg", "adamw", "adamw", "reg", "adamw"]
    made = [
        trial(2 * c + s, 10.0 - c, cell=c, seed=s, seconds=1.0 + c, optimizer__name=name)
        for c, name in enumerate(names)
        for s in range(2)
    ]
    made += [
        trial(12 + c, None, cell=6 + c, outcome=None, seconds=50.0, optimizer__name=name)
        for c, name in enumerate(["adamw", "reg"])
    ]
    return made


def test_tuning_counts_what_has_ended() -> None:
    adamw, reg = tuning(unbalanced(), section())
    assert (adamw.name, len(adamw.cells), adamw.trials, adamw.seconds) == ("adamw", 4, 8, 28.0)
    assert (reg.name, len(reg.cells), reg.trials, reg.seconds) == ("reg", 2, 4, 14.0)
    assert adamw.best is not None
    assert reg.best is not None
    assert (adamw.best.number, reg.best.number) == (5, 4)
    (lost,) = tuning([trial(0, None, outcome="failed", optimizer__name="reg")], section())
    assert lost.best is None


def test_groups_are_of_the_optimizer_or_the_first_choice() -> None:
    width = {"model.width": {"grid": [8, 16]}}
    trials = [trial(n, 1.0, model__width=8 * (1 + n % 2), optimizer__name="reg") for n in range(4)]
    conditional = {"a": {"choice": [1], "when": {"model.width": 8}}}
    found = [
        [group.name for group in tuning(trials, section(space, trials=8))]
        for space in (width | OPTIMIZERS, conditional | width, {"optimizer.lr": {"uniform": [0, 1]}})
    ]
    assert found == [["reg"], ["8", "16"], ["all"]]


def test_equal_budgets_of_an_unbalanced_sweep() -> None:
    by_cells = equal_budgets(unbalanced(), section())
    assert [t.cell for t in by_cells] == [0, 0, 1, 1, 2, 2, 4, 4]
    # reg took 4 + 10 = 14 s; adamw 2, 8, 16, 28 s after its cells
    by_seconds = equal_budgets(unbalanced(), section(), by="seconds")
    assert [t.cell for t in by_seconds] == [0, 0, 1, 1, 2, 2, 4, 4]
    slow = [t._replace(seconds=10.0) if t.cell == 2 else t for t in unbalanced()]
    assert {t.cell for t in equal_budgets(slow, section(), by="seconds")} == {0, 1, 4}
    assert equal_budgets([], section()) == []
    adamw, reg = tuning(by_cells, section())
    assert (len(adamw.cells), len(reg.cells)) == (2, 2)


results = st.sampled_from(["finished", "pruned", "failed", None])
values = st.one_of(st.none(), st.floats(-10.0, 10.0), st.sampled_from([math.nan, math.inf, -math.inf]))


@given(st.lists(st.tuples(results, values), max_size=20), st.sampled_from(["min", "max"]), st.floats(-10, 10))
def test_the_best_so_far_and_the_time_to_a_target(made: list[Any], mode: Any, target: float) -> None:
    trials = [
        trial(n, value, outcome=outcome, seconds=0.5, optimizer__name="reg")
        for n, (outcome, value) in enumerate(made)
    ]
    best, expected, reached = None, [], None
    pick = {"min": min, "max": max}[mode]
    for outcome, value in [m for m in made if m[0] is not None]:
        if outcome == "finished" and value is not None and math.isfinite(value):
            best = value if best is None else pick(best, value)
        expected.append(math.nan if best is None else best)
        if reached is None and best is not None and (best <= target if mode == "min" else best >= target):
            reached = (len(expected), 0.5 * len(expected))
    curve = best_so_far(reversed(trials), mode)
    np.testing.assert_array_equal(curve.best, expected)
    np.testing.assert_array_equal(curve.trials, np.arange(1, len(expected) + 1))
    np.testing.assert_allclose(curve.seconds, 0.5 * curve.trials)
    assert times_to_target(trials, section(mode=mode), target) == ({"reg": reached} if trials else {})


# -- importances


SPACE = {
    "optimizer.name": {"choice": ["adamw", "reg"]},
    "optimizer.lr": {"log_uniform": [1e-4, 1.0]},
    "model.layers": {"int": [1, 8]},
    "optimizer.decay": {"normal": [0.0, 1.0]},
    "optimizer.momentum": {"uniform": [0.0, 1.0], "when": {"optimizer.name": "reg"}},
}


def searched(decides: str, sign: float, count: int = 200) -> list[TrialRecord]:
    """Trials whose objective is `sign` times the distance of one key from its best value, and noise."""
    generator, made = np.random.default_rng(0), []
    for n in range(count):
        name = ["adamw", "reg"][generator.integers(2)]
        chosen: dict[str, Any] = {
            "optimizer__name": name,
            "optimizer__lr": float(10.0 ** generator.uniform(-4.0, 0.0)),
            "model__layers": int(generator.integers(1, 9)),
            "optimizer__decay": float(generator.normal()),
        }
        if name == "reg":
            chosen["optimizer__momentum"] = float(generator.uniform())
        distance = {
            "optimizer.name": float(name == "adamw"),
            "optimizer.lr": abs(math.log10(chosen["optimizer__lr"]) + 2.0),
            "model.layers": abs(chosen["model__layers"] - 3),
            "optimizer.decay": abs(chosen["optimizer__decay"] - 1.0),
        }[decides]
        made.append(trial(n, sign * (distance + 0.05 * float(generator.normal())), **chosen))
    return made


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("decides", [key for key in SPACE if key != "optimizer.momentum"])
def test_importances_find_the_key_that_decides(decides: str, mode: Any) -> None:
    recipe, trials = section(SPACE, mode=mode), searched(decides, 1.0 if mode == "min" else -1.0)
    trials += [trial(900, math.nan, optimizer__name="reg"), trial(901, 0.0, outcome="pruned")]
    found = importances(trials, recipe)
    assert next(iter(found)) == decides
    assert found[decides] > 0.5
    assert sum(found.values()) == pytest.approx(1.0)
    assert unranked(trials, recipe) == {"optimizer.momentum": "not in every trial"}
    assert set(found) == set(SPACE) - {"optimizer.momentum"}


def test_importances_are_not_made_of_too_little() -> None:
    recipe, trials = section(SPACE), searched("optimizer.lr", 1.0)
    assert importances(trials[:7], recipe) == {}
    assert importances(trials[:8], recipe) != {}
    assert importances([t._replace(cell=t.number // 30) for t in trials], recipe) == {}  # 7 cells
    assert importances([t._replace(value=1.0) for t in trials], recipe) == {}  # none is best
    same = [t._replace(values={**t.values, "model.layers": 4}) for t in trials]
    assert unranked(same, recipe)["model.layers"] == "one value alone"
    assert "model.layers" not in importances(same, recipe)
    assert importances([], recipe) == {}


# -- size


@pytest.mark.slow
def test_the_cost_grows_with_the_trials_not_with_their_square() -> None:
    generator = np.random.default_rng(0)
    names, space = (
        ["adamw", "muon", "reg", "sgd"],
        OPTIMIZERS | {"optimizer.lr": {"log_uniform": [1e-4, 1.0]}},
    )
    everything = [
        trial(
            n, float(generator.normal()), cell=n // 2, seed=n % 2, optimizer__name=names[n // 2 % 4],
            optimizer__lr=float(10.0 ** generator.uniform(-4.0, 0.0)),
        )
        for n in range(20_000)
    ]  # fmt: skip
    recipe = section(space, baseline={"optimizer.name": "adamw"}, target=-3.0)

    def cost(trials: list[TrialRecord]) -> float:
        gc.collect()
        gc.disable()  # a collection walks over all that the tests before this one have left
        begun = time.process_time()
        against_baseline(cells(trials, "min"), recipe)
        against_baseline(cells(trials, "min"), section(space))
        tuning(equal_budgets(trials, recipe, by="seconds"), recipe)
        times_to_target(trials, recipe, -3.0)
        seconds = time.process_time() - begun
        gc.enable()
        return seconds

    cost(everything[:2000])
    small = min(cost(everything[:2000]) for _ in range(3))
    large = min(cost(everything) for _ in range(3))
    assert large < 30.0 * small  # linear: 10; quadratic: 100
    assert large < 5.0
