"""What came of a sweep: cells and their uncertainty, comparisons, tuning, importances.

The objective of a cell is its mean over the seeds that finished with a finite value. A *group* is what
tuning is counted for: the cells with one value of the space's first `choice` or `grid` entry, of
`optimizer.name` where that is one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from piste.ledger.tables import TrialRecord
from piste.space import Entry, Sweep, Values

if TYPE_CHECKING:
    import optuna

Interval = tuple[float, float]
Mode = Literal["min", "max"]
Member = TypeVar("Member", "Cell", TrialRecord)

CONFIDENCE = 0.95
RESAMPLES = 10_000
LEAST_CELLS = 8  # fewer say nothing about importances
MOST_TRIALS = 10_000  # more say the same, and cost seconds


@dataclass(frozen=True)
class Cell:
    """A point of the space, with what came of its seeds.

    Attributes:
        number: Its number in the sweep.
        values: Its values, without the seed.
        by_seed: The objective of each seed that finished with a finite one.
        failed: Seeds that failed, or finished with an objective that is not finite.
        pruned: Seeds that the scheduler stopped; their objectives are of an earlier step and not used.
        seconds: Computing time of all its seeds; a reused trial counts with what it once took.
    """

    number: int
    values: Values
    by_seed: Mapping[int, float]
    failed: int
    pruned: int
    seconds: float

    @property
    def n(self) -> int:
        """Seeds that the mean is over."""
        return len(self.by_seed)

    @property
    def ended(self) -> int:
        """Trials that have ended, in whatever way."""
        return self.n + self.failed + self.pruned

    @cached_property
    def mean(self) -> float:
        """The mean over seeds; NaN without any."""
        # divided first: two diverged seeds may be above half of the largest number
        return sum(value / self.n for value in self.by_seed.values()) if self.by_seed else math.nan

    @cached_property
    def interval(self) -> Interval | None:
        """The 95 % bootstrap percentile interval of the mean over seeds; None with fewer than two.

        Too narrow with few seeds: it covers the mean of symmetric noise in 50 % of all cells with 2 seeds
        and 75 % with 3, as it is the range of the values there. Up to 5 seeds it is exact, over all resamples
        there are; with more it is over 10,000 draws of a generator seeded with the number of seeds.

        Source: B. Efron, The Jackknife, the Bootstrap and Other Resampling Plans (1982), chapter 10.
        """
        if self.n < 2:
            return None
        values = np.array([self.by_seed[seed] for seed in sorted(self.by_seed)])
        means = (values / self.n)[_resamples(self.n)].sum(axis=1)
        tail = (1.0 - CONFIDENCE) / 2.0
        low, high = np.quantile(means, [tail, 1.0 - tail], method="inverted_cdf")
        return float(low), float(high)


@lru_cache(maxsize=8)
def _resamples(n: int) -> NDArray[np.intp]:
    """Which of `n` seeds each resample takes, `(resamples, n)`."""
    if n <= 5:
        return np.array(list(product(range(n), repeat=n)))
    return np.random.default_rng(n).integers(n, size=(RESAMPLES, n))


def cells(trials: Iterable[TrialRecord], mode: Mode) -> list[Cell]:
    """The cells of a sweep, best first.

    Whole cells come first. Those with a seed that failed, diverged or was pruned rank behind them, whatever
    the mean of the seeds that are left: what diverges with one seed of three is not the best, and the seeds
    that a scheduler spares are the good ones. Cells without an objective come last. A trial that has not
    ended does not count against its cell.
    """
    found: dict[int, list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        found[trial.cell].append(trial)
    return sorted((_cell(number, members) for number, members in found.items()), key=rank(mode))


def rank(mode: Mode) -> Callable[[Cell], tuple[bool, bool, float, int]]:
    """The order of `cells`, as a key to sort by."""
    sign = 1.0 if mode == "min" else -1.0
    return lambda c: (not c.n, not (c.failed == c.pruned == 0), sign * c.mean if c.n else 0.0, c.number)


def _cell(number: int, members: Sequence[TrialRecord]) -> Cell:
    by_seed = {t.seed: t.value for t in members if t.value is not None and counts(t)}
    pruned = sum(t.outcome == "pruned" for t in members)
    ended = sum(t.outcome is not None for t in members)
    seconds = sum(t.seconds for t in members)
    return Cell(number, members[0].values, by_seed, ended - pruned - len(by_seed), pruned, seconds)


def counts(trial: TrialRecord) -> bool:
    """Whether a trial finished with a finite objective."""
    return trial.outcome == "finished" and trial.value is not None and math.isfinite(trial.value)


class Paired(NamedTuple):
    """Two cells over the seeds that both have.

    Attributes:
        n: Pairs.
        difference: The mean of cell minus baseline; None without a pair.
        interval: Its 95 % interval (Student's t); None where there is none.
        p: Two-sided, that the mean difference is 0; None with fewer than two pairs.
    """

    n: int
    difference: float | None
    interval: Interval | None
    p: float | None


def paired(cell: Cell, baseline: Cell) -> Paired:
    """The paired t-test over common seeds.

    Where all differences are the same (within rounding) they have no variance, and the test none either.
    Then p is 1 for a difference of 0. It is 0 for another one where neither cell depends on its seed, as
    nothing is left to chance. Where the seeds do matter, as of a metric with few distinct values, it is the
    sign test's `2^(1 - n)`, without an interval.
    """
    pairs = [(cell.by_seed[s], baseline.by_seed[s]) for s in sorted(cell.by_seed) if s in baseline.by_seed]
    n = len(pairs)
    if n == 0:
        return Paired(0, None, None, None)
    differences = [a - b for a, b in pairs]
    mean = sum(d / n for d in differences)
    if n == 1 or not math.isfinite(mean):
        return Paired(n, mean, None, None)
    rounding = 4.0 * math.ulp(1.0) * max(abs(value) for pair in pairs for value in pair)
    if _range(differences) <= rounding:
        certain = _range([a for a, _ in pairs]) <= rounding  # and so b, as a - b is the same
        p = 1.0 if abs(mean) <= rounding else 0.0 if certain else 2.0 ** (1 - n)
        return Paired(n, mean, (mean, mean) if certain else None, p)
    # s^2 = sum_i (d_i - mean)^2 / (n - 1), in units of the largest difference: squares do not overflow
    unit = max(abs(d) for d in differences)
    deviation = unit * math.sqrt(sum(((d - mean) / unit) ** 2 for d in differences) / (n - 1))
    error = deviation / math.sqrt(n)
    # p = 2 P(T_{n-1} <= -|mean| sqrt(n) / s)
    p = 2.0 * float(stdtr(n - 1, -abs(mean) / error))
    # mean -+ t_{n-1} s / sqrt(n)
    half = float(stdtrit(n - 1, (1.0 + CONFIDENCE) / 2.0)) * error
    return Paired(n, mean, (mean - half, mean + half), p)


def _range(values: Sequence[float]) -> float:
    return max(values) - min(values)


def holm(p: Sequence[float], comparisons: int | None = None) -> list[float]:
    """p-values adjusted for all of their family, of which some may not be given (S. Holm 1979)."""
    m = len(p) if comparisons is None else comparisons
    order = sorted(range(len(p)), key=p.__getitem__)
    # p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))
    steps = accumulate((min(1.0, (m - rank) * p[index]) for rank, index in enumerate(order)), max)
    adjusted = dict(zip(order, steps, strict=True))
    return [adjusted[index] for index in range(len(p))]


class Comparison(NamedTuple):
    """A cell against the baseline.

    Attributes:
        cell: The cell.
        baseline: What it is compared with.
        paired: Over the seeds that both have.
        p: Adjusted for all comparisons of the sweep; None where no test can be made.
        verdict: "better", "worse", "no difference found at n=3"; "failed" or "pruned" where it might be
            better, but on the seeds alone that are left.
    """

    cell: Cell
    baseline: Cell
    paired: Paired
    p: float | None
    verdict: str


def baselines(cells: Sequence[Cell], section: Sweep) -> list[Cell]:
    """The cells that the baseline is the first of: those that have its values, or the best of each group."""
    if not section.baseline:
        return [members[0] for members in groups(cells, section).values()]
    absent, constants = object(), section.constants
    wanted = [(key, constants.get(key, absent), plain(v)) for key, v in section.baseline.items()]
    return [c for c in cells if all(plain(c.values.get(key, other)) == v for key, other, v in wanted)]


def against_baseline(cells: Sequence[Cell], section: Sweep, level: float = 0.05) -> list[Comparison]:
    """Compares cells with the baseline, in their order.

    With `sweep.baseline` every other cell is compared with the best one that has its values; without, the
    best cell of each other group with the best of all. The p-values are adjusted (Holm) over all pairs that
    might have been compared: where the data chose the baseline, those of its rivals too. Not corrected is
    the choice of a group's best cell: the best of more cells is better, so that groups are compared fairly
    at equal budgets alone.

    Args:
        cells: All cells, best first (`cells`).
        section: The sweep's `[sweep]`.
        level: The probability of any false "better" or "worse" where equally tuned groups do not differ.

    Returns:
        Nothing where no cell has the baseline's values, or none of those an objective.
    """
    candidates = baselines(cells, section)
    if not candidates or not candidates[0].n:
        return []
    others = cells if section.baseline else candidates
    baseline, k = candidates[0], len(candidates)
    compared = [(cell, paired(cell, baseline)) for cell in others if cell is not baseline]
    tests = [pair.p for _, pair in compared if pair.p is not None]
    adjusted = iter(holm(tests, k * (len(others) - k) + math.comb(k, 2)))
    made = []
    for cell, pair in compared:
        p = None if pair.p is None else next(adjusted)
        made.append(Comparison(cell, baseline, pair, p, _verdict(cell, pair, p, section.mode, level)))
    return made


def _verdict(cell: Cell, pair: Paired, p: float | None, mode: Mode, level: float) -> str:
    differs = p is not None and p <= level
    if differs and ((pair.difference or 0.0) < 0.0) != (mode == "min"):
        return "worse"
    if cell.failed or cell.pruned:
        return "failed" if cell.failed else "pruned"
    return "better" if differs else f"no difference found at n={pair.n}"


def plain(value: Any) -> Any:
    """A value as a recipe has it: JSON has made lists of its tuples."""
    return tuple(value) if isinstance(value, list) else value


def group_key(section: Sweep) -> str | None:
    """What tuning is counted for; None where there is no such entry, and all cells are one group."""
    keys = [k for k, e in section.entries.items() if e.kind in ("choice", "grid") and not e.when]
    return "optimizer.name" if "optimizer.name" in keys else next(iter(keys), None)


def groups(members: Iterable[Member], section: Sweep) -> dict[str, list[Member]]:
    """The cells, or trials, of each group, in their order."""
    key = group_key(section)
    found: dict[str, list[Member]] = {}
    for member in members:
        name = "all" if key is None else str(plain(member.values.get(key)))
        found.setdefault(name, []).append(member)
    return found


class Group(NamedTuple):
    """How much tuning one group got: its cells, best first, and what its ended trials took."""

    name: str
    cells: tuple[Cell, ...]
    trials: int
    seconds: float

    @property
    def best(self) -> Cell | None:
        """Its best cell; None where no trial gave an objective."""
        return self.cells[0] if self.cells[0].n else None


def tuning(trials: Iterable[TrialRecord], section: Sweep) -> list[Group]:
    """How much tuning each group got, the group with the best cell first."""
    return [
        Group(name, tuple(members), sum(c.ended for c in members), sum(c.seconds for c in members))
        for name, members in groups(cells(ended(trials), section.mode), section).items()
    ]


def equal_budgets(
    trials: Sequence[TrialRecord], section: Sweep, by: Literal["cells", "seconds"] = "cells"
) -> list[TrialRecord]:
    """The trials that are left where each group has as much tuning as the one with the least.

    Args:
        trials: All trials.
        section: The sweep's `[sweep]`.
        by: "cells": each group's first cells in number order, as many as the smallest group has.
            "seconds": those that fit the computing time of the group that took the least.
    """
    in_order = sorted(cells(ended(trials), section.mode), key=lambda c: c.number)
    totals = [
        [*zip(members, accumulate(1.0 if by == "cells" else c.seconds for c in members), strict=True)]
        for members in groups(in_order, section).values()
    ]
    share = min((members[-1][1] for members in totals), default=0.0)
    kept = {cell.number for members in totals for cell, total in members if total <= share}
    return [trial for trial in trials if trial.cell in kept]


def ended(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Those that have ended, in the order of their numbers."""
    return sorted((t for t in trials if t.outcome is not None), key=lambda t: t.number)


class BestSoFar(NamedTuple):
    """The best objective after each trial that has ended, each `(trials,)`; NaN before the first one."""

    trials: NDArray[np.intp]
    seconds: NDArray[np.float64]
    best: NDArray[np.float64]


def best_so_far(trials: Iterable[TrialRecord], mode: Mode) -> BestSoFar:
    """The best single trial so far, in number order."""
    done = ended(trials)
    values = np.array([t.value if counts(t) else math.nan for t in done], dtype=np.float64)
    best = (np.fmin if mode == "min" else np.fmax).accumulate(values)
    return BestSoFar(np.arange(1, len(done) + 1), np.cumsum([t.seconds for t in done], dtype=float), best)


def times_to_target(
    trials: Iterable[TrialRecord], section: Sweep, target: float
) -> dict[str, tuple[int, float] | None]:
    """Trials and computing seconds of each group until one first reached the target; None: none has."""
    found: dict[str, tuple[int, float] | None] = {}
    for name, members in groups(trials, section).items():
        curve = best_so_far(members, section.mode)
        reached = curve.best <= target if section.mode == "min" else curve.best >= target
        first = int(np.argmax(reached)) if reached.any() else None
        found[name] = None if first is None else (first + 1, float(curve.seconds[first]))
    return found


def importances(trials: Iterable[TrialRecord], section: Sweep) -> dict[str, float]:
    """How much each searched key decides whether a trial is among the best; they sum to 1, largest first.

    PED-ANOVA (S. Watanabe, A. Bansal, F. Hutter 2023, arXiv 2304.10255) as Optuna has it, over the trials
    that finished with a finite objective, 10,000 of them at random where there are more. The best are a
    tenth of them, or 5 where that is more. The keys that `unranked` names are left out.

    Returns:
        Nothing with fewer than 8 such cells, and where the best are no better than the others.
    """
    finished = [trial for trial in trials if counts(trial)]
    if len(finished) > MOST_TRIALS:
        chosen = np.random.default_rng(0).choice(len(finished), MOST_TRIALS, replace=False)
        finished = [finished[index] for index in sorted(chosen)]
    keys = sorted(section.entries.keys() - unranked(finished, section))
    if len({trial.cell for trial in finished}) < LEAST_CELLS or not keys:
        return {}
    share = max(0.1, min(0.5, 5.0 / len(finished)))
    ordered = sorted((t.value or 0.0 for t in finished), reverse=section.mode == "max")
    if ordered[math.ceil(share * len(finished)) - 1] == ordered[-1]:
        return {}

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize" if section.mode == "min" else "maximize")
    coded = {key: _coded(section.entries[key], [plain(t.values[key]) for t in finished]) for key in keys}
    distributions = {key: distribution for key, (distribution, _) in coded.items()}
    for index, t in enumerate(finished):
        params = {key: column[index] for key, (_, column) in coded.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=t.value))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=share)
    return optuna.importance.get_param_importances(study, evaluator=evaluator, params=keys)


def unranked(trials: Iterable[TrialRecord], section: Sweep) -> dict[str, str]:
    """The searched keys that have no importance, each with the reason."""
    finished, found = [trial for trial in trials if counts(trial)], dict[str, str]()
    for key in section.entries:
        seen = [plain(trial.values[key]) for trial in finished if key in trial.values]
        if len(seen) < len(finished):
            found[key] = "not in every trial"
        elif len(set(seen)) < 2:
            found[key] = "one value alone"
    return found


def _coded(entry: Entry, column: list[Any]) -> tuple[optuna.distributions.BaseDistribution, list[Any]]:
    """A key's values as Optuna's evaluator takes them: a choice is its place among those seen."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if entry.finite is not None and entry.integer is None:
        place = {value: index for index, value in enumerate(dict.fromkeys(column))}
        return CategoricalDistribution(range(len(place))), [place[value] for value in column]
    if entry.integer is not None:
        return IntDistribution(min(column), max(column)), column
    return FloatDistribution(min(column), max(column), log=entry.log_uniform is not None), column
