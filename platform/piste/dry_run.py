"""What a sweep would compute, and about how long that takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from piste.config import Recipe
from piste.ledger import Ledger
from piste.ledger import Sweep as SweepRow
from piste.preflight import cpus
from piste.search import Known, suggest, sweep_key
from piste.space import Sweep
from piste.sweeping import checked_section
from piste.trials import Planned, Planner

# Runs of the ledger that an estimate rests on, the newest first.
RUNS = 50


@dataclass(frozen=True)
class DryRun:
    """What a sweep would compute.

    Attributes:
        compute: The trials that would be computed.
        reused: The trials that a finished run has computed already, by the number: `(trial, run)`.
        unfit: The trials whose values do not fit together: they fail at once.
        later: Trials whose values depend on the results of these; None where the searcher decides how many.
        seconds: About how long one trial takes; None where the ledger has nothing to tell it by.
        basis: What that rests on.
        at_a_time: How many trials are computed at a time.
    """

    compute: tuple[Planned, ...]
    reused: tuple[tuple[Planned, str], ...]
    unfit: tuple[Planned, ...]
    later: int | None
    seconds: float | None
    basis: str
    at_a_time: int

    @property
    def total(self) -> float | None:
        """Computing time of all trials whose number is known; None where nothing is known of one."""
        return None if self.seconds is None else self.seconds * (len(self.compute) + (self.later or 0))


def dry_run(ledger: Ledger, name: str, config: Recipe, *, local: bool = False, fresh: bool = False) -> DryRun:
    """Says what a sweep would compute; records nothing.

    Args:
        ledger: The ledger in use.
        name: The recipe's name.
        config: The recipe.
        local: In this process, one after the other.
        fresh: Computes again what an identical finished run has computed.

    Raises:
        BadInput: As for `piste.sweep`.
    """
    section = checked_section(name, config)
    table = config.model_dump(mode="json")
    row = SweepRow(id=name, recipe=name, workload=config.workload, config=table, directory="")
    planned = _first_trials(section, config.seed, Planner(row, section))
    configs = {item.run["identity"]: item.config for item in planned if item.config is not None}
    found = {} if fresh else ledger.sweeps.reusable(list(configs), section.metric)
    reused = tuple((p, found[p.run["identity"]][0]) for p in planned if p.run["identity"] in found)
    compute = tuple(p for p in planned if p.config is not None and p.run["identity"] not in found)
    later = None if section.cells is None else section.cells * section.repeats - len(planned)
    recipes = [p.config for p in compute if p.config is not None]
    seconds, basis = _cost(ledger, config.workload, recipes)
    cores = max((r.resources.workers * r.resources.cpus_per_worker for r in recipes), default=1)
    at_a_time = 1 if local else section.concurrency or max(1, cpus() // cores)
    return DryRun(
        compute, reused, tuple(p for p in planned if p.config is None), later, seconds, basis, at_a_time
    )


def _first_trials(section: Sweep, seed: int, planner: Planner) -> list[Planned]:
    """The trials whose values depend on no result."""
    strata, key = len(section.strata), sweep_key(section, seed)
    if section.searcher == "bisect":
        cells = 2 * strata
    elif section.searcher in ("grid", "random"):
        cells = section.cells or 0
    else:
        cells = min(section.batch * strata, section.cells or 0)
    pending: list[list[Known]] = [[] for _ in range(strata)]
    planned = []
    for cell in range(cells):
        known = pending[cell % strata]
        suggestion = suggest(section, key, cell, known)
        assert suggestion is not None
        known.append(Known(cell, suggestion.values, suggestion.memory, "pending", None))
        planned += [planner.resolve(trial) for trial in planner.trials(cell, suggestion)]
    return planned


def _cost(ledger: Ledger, workload: str, recipes: Sequence[Recipe]) -> tuple[float | None, str]:
    """Seconds of one trial: the median step time of the newest runs of the workload, times the steps."""
    runs = ledger.finished(workload, RUNS)
    steps = [recipe.total_steps for recipe in recipes if hasattr(recipe, "total_steps")]
    times = [median for run in runs if (median := _step_seconds(ledger, run.id)) is not None]
    if times and steps:
        mean, each = statistics.mean(steps), statistics.median(times)
        return mean * each, f"{mean:g} steps x {1e3 * each:.3g} ms, the median of {len(times)} runs"
    whole = [run.seconds for run in runs if run.seconds > 0.0]
    if whole:
        return statistics.median(whole), f"the median of {len(whole)} runs of {workload}"
    return None, f"no finished run of {workload} is in the ledger"


def _step_seconds(ledger: Ledger, run_id: str) -> float | None:
    times = [milliseconds for _, milliseconds in ledger.history(run_id, "time/step_ms")]
    return statistics.median(times) / 1e3 if times else None
