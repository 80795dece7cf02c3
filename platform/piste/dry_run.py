"""What a sweep would compute, and about how long that takes."""

from __future__ import annotations

import statistics
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
        later: Trials whose values depend on the results of these; None where the searcher decides how many.
        seconds: About how long one trial takes; None where the ledger has nothing to tell it by.
        basis: What that rests on.
        at_a_time: How many trials are computed at a time.
    """

    compute: tuple[Planned, ...]
    reused: tuple[tuple[Planned, str], ...]
    later: int | None
    seconds: float | None
    basis: str
    at_a_time: int


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
    identities = [item.run["identity"] for item in planned if item.config is not None]
    found = {} if fresh else ledger.sweeps.reusable(identities, section.metric)
    reused = tuple((p, found[p.run["identity"]][0]) for p in planned if p.run["identity"] in found)
    compute = tuple(p for p in planned if p.run["identity"] not in found)
    later = None if section.cells is None else section.cells * section.repeats - len(planned)
    seconds, basis = _cost(ledger, config)
    resources = config.resources
    fits = max(1, cpus() // (resources.workers * resources.cpus_per_worker))
    return DryRun(compute, reused, later, seconds, basis, 1 if local else section.concurrency or fits)


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


def _cost(ledger: Ledger, config: Recipe) -> tuple[float | None, str]:
    """Seconds of one trial: the median step time of the newest runs of the workload, times its steps."""
    runs = ledger.finished(config.workload, RUNS)
    steps = getattr(config, "total_steps", None)
    times = [median for run in runs if (median := _step_seconds(ledger, run.id)) is not None]
    if times and steps is not None:
        basis = f"{steps} steps x {1e3 * statistics.median(times):.3g} ms, the median of {len(times)} runs"
        return steps * statistics.median(times), basis
    whole = [run.seconds for run in runs if run.seconds > 0.0]
    if whole:
        return statistics.median(whole), f"the median of {len(whole)} runs of {config.workload}"
    return None, f"no finished run of {config.workload} is in the ledger"


def _step_seconds(ledger: Ledger, run_id: str) -> float | None:
    times = [milliseconds for _, milliseconds in ledger.history(run_id, "time/step_ms")]
    return statistics.median(times) / 1e3 if times else None
