"""What a sweep does next, and what came of what it did.

Whoever executes a sweep, Ray Tune or a plain loop, asks `next` for work and answers with `settle`. A trial is
in the ledger before it starts, with its values and its run, so that a sweep whose driver died goes on from
a query. Packs alone are recorded with their results: what dies with a pack is suggested and computed again.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from piste import packing
from piste.config import Resources, validate
from piste.errors import BadInput
from piste.ledger import Ledger
from piste.ledger import Sweep as SweepRow
from piste.search import Known, Suggestion, suggest, sweep_key
from piste.space import Sweep
from piste.stopping import PREEMPTED
from piste.trials import Planned, Planner, Trial, Work, better, columns, converged, is_closed, outcome_of


@dataclass
class Counts:
    """Where a sweep stands."""

    total: int | None = None
    finished: int = 0
    pruned: int = 0
    failed: int = 0
    reused: int = 0
    running: int = 0
    best: Trial | None = None
    started: float = 0.0
    fresh: int = 0  # trials that this session has computed

    @property
    def ended(self) -> int:
        """Trials that have an outcome."""
        return self.finished + self.pruned + self.failed

    @property
    def seconds(self) -> float:
        """How long this session has taken."""
        return time.monotonic() - self.started

    @property
    def eta(self) -> float | None:
        """Seconds until the last trial ends, at this session's pace; None where that is not known."""
        if self.total is None or self.fresh == 0:
            return None
        return max(0, self.total - self.ended) * self.seconds / self.fresh


class Schedule:
    """What a sweep does next.

    Args:
        ledger: The ledger that has it.
        row: The sweep.
        fresh: Computes trials again that another run has computed already.
    """

    def __init__(self, ledger: Ledger, row: SweepRow, fresh: bool = False) -> None:
        self.ledger = ledger
        self.sweep_id = row.id
        self.section = Sweep.model_validate(row.config["sweep"])
        self._planner = Planner(row, self.section)
        self._fresh = fresh
        self._key = sweep_key(self.section, int(row.config["seed"]))
        self._strata = len(self.section.strata)
        self._limit = None if row.trials is None else row.trials // self.section.repeats
        self._cells: list[dict[int, list[Trial]]] = [{} for _ in range(self._strata)]
        self._position = [0] * self._strata
        self._closed = [0] * self._strata
        self._done = [False] * self._strata
        self._queue: deque[Work] = deque()
        self._running: set[int] = set()
        self._spent = row.seconds
        self._cost = 0.0
        self.counts = Counts(total=row.trials, started=time.monotonic())
        self._load()

    # -- what an executor asks ----------------------------------------------------------------------

    def next(self, most: int = 1) -> Work | None:
        """The next work, or None: there is none now (`ended` says whether there will be).

        Args:
            most: The most trials of a pack.
        """
        # What is planned may all be there already.
        while not self._queue and self.stopped_by() is None and self._plan(most):
            pass
        if not self._queue:
            return None
        work = self._queue.popleft()
        self._running.update(trial.number for trial in work.trials)
        self.counts.running = len(self._running)
        return work

    def put_back(self, work: Work) -> None:
        """Takes note that work from `next` has not been computed: it comes again."""
        self._running.difference_update(trial.number for trial in work.trials)
        self.counts.running = len(self._running)
        self._queue.append(work)

    @property
    def ended(self) -> bool:
        """Whether nothing runs and nothing is left to start."""
        left = None if self.stopped_by() else next(self._ready(), None)
        return not self._running and not self._queue and left is None

    def settle(self, work: Work, failure: str | None = None, seconds: float = 0.0) -> None:
        """Takes note that work has ended; what came of it stands in the ledger.

        Args:
            work: From `next`.
            failure: Why its process died, or why a pack could not be computed.
            seconds: How long a pack has computed.
        """
        self._running.difference_update(trial.number for trial in work.trials)
        if work.packed:
            self._cost += seconds
            self._settle_pack(work, failure)
        else:
            self._settle_run(work, failure)
        self.counts.running = len(self._running)

    def stopped_by(self) -> str | None:
        """Which budget is used up, if one is."""
        budget, resources = self.section.budget, self.resources
        used = {
            "seconds": self._spent + self.counts.seconds,
            "cpu_seconds": self._cost * resources.workers * resources.cpus_per_worker,
            "gpu_seconds": self._cost * resources.workers * resources.gpus_per_worker,
        }
        for name, amount in used.items():
            most = getattr(budget, name)
            if most is not None and amount >= most:
                return f"budget.{name}: {amount:.0f} of {most:g} used"
        if self._on_plateau():
            return f"budget.plateau: {budget.plateau} cells without a better one"
        return None

    @property
    def reason(self) -> str | None:
        """Why a sweep that has ended has not had all its trials; None where it has."""
        return self.stopped_by() if next(self._ready(), None) is not None else None

    @cached_property
    def resources(self) -> Resources:
        """What one trial gets."""
        return Resources.model_validate(self._planner.base["resources"])

    @property
    def total_steps(self) -> int:
        """Where the runs end.

        Raises:
            BadInput: The workload does not say it.
        """
        config = validate(self._planner.module.Config, self._planner.base, self.sweep_id)
        steps = getattr(config, "total_steps", None)
        if steps is None:
            scheduler = self.section.scheduler
            raise BadInput(f"sweep.scheduler = {scheduler!r}: {config.workload!r} has no total_steps")
        return int(steps)

    # -- planning -----------------------------------------------------------------------------------

    def _on_plateau(self) -> bool:
        """Whether the last `budget.plateau` closed cells have brought nothing better."""
        patience = self.section.budget.plateau
        if patience is None:
            return False
        sign = 1.0 if self.section.mode == "min" else -1.0
        best, since = math.inf, 0
        for cell in self._closed_in_order():
            score = sign * self._known(cell).value  # type: ignore[operator]
            best, since = (score, 0) if score < best else (best, since + 1)
        return since >= patience

    def _closed_in_order(self) -> Iterator[list[Trial]]:
        """The cells of all batches that are whole, in the order of their numbers."""
        places = min(self._closed_places(stratum) for stratum in range(self._strata))
        for place in range(places // self.section.batch * self.section.batch):
            for cells in self._cells:
                yield cells[place]

    def _closed_places(self, stratum: int) -> int:
        """How many cells of a stratum are closed without a gap."""
        cells = self._cells[stratum]
        while (cell := cells.get(self._closed[stratum])) is not None and is_closed(cell):
            self._closed[stratum] += 1
        return self._closed[stratum]

    def _beyond(self, cell: int) -> bool:
        return self._limit is not None and cell >= self._limit

    def _ready(self) -> Iterator[int]:
        """For each stratum its next cell, where that may be suggested now; lowest first."""
        candidates = sorted(k * self._strata + stratum for stratum, k in enumerate(self._position))
        for cell in candidates:
            if not self._done[cell % self._strata] and not self._beyond(cell) and self._may_suggest(cell):
                yield cell

    def _may_suggest(self, cell: int) -> bool:
        """Whether all cells that the suggestion depends on are closed."""
        stratum, place = cell % self._strata, cell // self._strata
        if self.section.searcher == "bisect":
            # Both ends at once, then each probe upon the ones before.
            first = 0 if place < 2 else place
        elif self.section.budget.plateau is None and (
            self.section.asynchronous or self.section.searcher in ("grid", "random")
        ):
            return True
        else:
            first = place // self.section.batch * self.section.batch
        return self._closed_places(stratum) >= first

    def _plan(self, most: int) -> bool:
        """Suggests one cell, or as many as fill a pack, and queues their trials; returns whether it could."""
        planned: list[Planned] = []
        while len(planned) < (most if self.packable else 1):
            cell = next(self._ready(), None)
            if cell is None:
                break
            suggestion = suggest(self.section, self._key, cell, self._history(cell))
            if suggestion is None:
                self._done[cell % self._strata] = True
                continue
            for trial in self._planner.trials(cell, suggestion):
                self._add(trial)
                planned.append(self._planner.resolve(trial))
        self._enqueue(planned)
        return bool(planned)

    def _enqueue(self, planned: Sequence[Planned]) -> None:
        """Records trials and queues what is to be computed of them; packs are recorded with their results."""
        reused = {} if self._fresh else self._reusable(planned)
        settled: list[Planned] = []
        left: list[Planned] = []
        for item in planned:
            if item.run["identity"] in reused:
                item.trial.run_id, item.trial.step, item.trial.value = reused[item.run["identity"]]
                item.trial.reused, item.trial.outcome = True, "finished"
            (left if item.trial.outcome is None else settled).append(item)
        configs = [item.config for item in left if item.config is not None]
        packs, alone = (
            packing.groups(self._planner.module, configs) if self.packable else ([], range(len(left)))
        )
        single = [left[index] for index in alone]
        new = [item.run for item in [*settled, *single] if not item.trial.reused]
        self.ledger.sweeps.record(new, [columns(self.sweep_id, item.trial) for item in [*settled, *single]])
        for item in settled:
            self._count(item.trial)
        self._queue.extend(Work((item.trial,), (item.config,)) for item in single)
        for pack in packs:
            trials, configs, runs = zip(*(left[index] for index in pack), strict=True)
            self._queue.append(Work(trials, configs, runs))

    @cached_property
    def packable(self) -> bool:
        """Whether trials may be packed: the workload can, the recipe wants it, and no scheduler ends some."""
        wanted = self.section.pack and self.section.scheduler == "fifo"
        return wanted and hasattr(self._planner.module, "train_many")

    def _add(self, trial: Trial) -> None:
        stratum, place = trial.cell % self._strata, trial.cell // self._strata
        self._cells[stratum].setdefault(place, []).append(trial)
        while self._position[stratum] in self._cells[stratum]:
            self._position[stratum] += 1

    def _history(self, cell: int) -> list[Known]:
        """What the suggestion of a cell may depend on, in the order of the numbers."""
        if self.section.searcher in ("grid", "random"):
            return []
        stratum, place = cell % self._strata, cell // self._strata
        ends = self.section.searcher == "bisect"
        first = place // self.section.batch * self.section.batch
        if self.section.asynchronous or ends:
            first = place
        cells = self._cells[stratum]
        return [self._known(cells[k], k >= first) for k in sorted(cells) if k < place]

    def _known(self, cell: Sequence[Trial], pending: bool = False) -> Known:
        head = cell[0]
        if pending or not is_closed(cell):
            return Known(head.cell, head.values, head.memory, "pending", None)
        if self.section.searcher == "bisect":
            value = sum(converged(self.ledger, self.section, trial) for trial in cell) / len(cell)
            return Known(head.cell, head.values, head.memory, "complete", value)
        worst = math.inf if self.section.mode == "min" else -math.inf
        values = [
            worst if t.outcome == "failed" or t.value is None or not math.isfinite(t.value) else t.value
            for t in cell
        ]
        pruned = any(t.outcome == "pruned" for t in cell)
        step = max((t.step or 0 for t in cell), default=None)
        state: Literal["pruned", "complete"] = "pruned" if pruned else "complete"
        return Known(head.cell, head.values, head.memory, state, sum(values) / len(values), step)

    def _reusable(self, planned: Sequence[Planned]) -> dict[str, tuple[str, int, float]]:
        """Runs that have computed these trials already: `{identity: (run id, last step, objective)}`."""
        identities = [item.run["identity"] for item in planned if item.config is not None]
        return self.ledger.sweeps.reusable(identities, self.section.metric) if identities else {}

    # -- settling -----------------------------------------------------------------------------------

    def _settle_run(self, work: Work, failure: str | None) -> None:
        """One trial's run has ended, or its process has died."""
        (trial,) = work.trials
        row = self.ledger.run(trial.run_id)
        self._cost += row.seconds - trial.seconds
        trial.seconds = row.seconds
        if row.status == "interrupted" and self._goes_on(trial, row.error):
            self._queue.append(work)
            return
        last = self.ledger.sweeps.objective([trial.run_id], self.section.metric).get(trial.run_id)
        trial.step, trial.value = last if last is not None else (None, None)
        cause, error = self._failure(row.status, row.error, trial.value, failure)
        if cause is None:
            trial.outcome = "finished" if row.status == "finished" else "pruned"
            if row.status != "finished":
                self.ledger.set_status(trial.run_id, "pruned")
        else:
            self.ledger.set_status(trial.run_id, "finished" if cause == "nan" else "failed", error)
            if trial.tries < getattr(self.section.retries, cause, 0):
                self._try_again(work, cause)
                return
            trial.outcome = "failed"
        self.ledger.sweeps.settle(self.sweep_id, trial.number, trial.outcome, trial.value, trial.step)
        self._count(trial)

    def _goes_on(self, trial: Trial, why: str | None) -> bool:
        """Whether a trial that was stopped with a checkpoint may go on from it."""
        trial.preemptions += why == PREEMPTED
        return not 0 <= self.resources.max_preemptions < trial.preemptions

    def _failure(
        self, status: str, error: str | None, value: float | None, death: str | None
    ) -> tuple[str | None, str | None]:
        """What a trial failed of (`died`, `error`, `nan`, `preempted`) and the message, where it did."""
        if status == "finished" and value is None:
            return "error", f"it never logged {self.section.metric!r}"
        if status == "finished" and not math.isfinite(value or 0.0):
            return "nan", f"{self.section.metric} ended at {value}"
        if status == "interrupted":
            return "preempted", f"preempted more often than resources.max_preemptions allows: {error}"
        if death is not None and status != "finished":
            return "died", death  # whatever the attempt before has failed of
        if status == "failed":
            return "died" if "OutOfMemory" in (error or "") else "error", error
        return None, None

    def _try_again(self, work: Work, cause: str) -> None:
        """Queues a trial once more: from its last checkpoint, or, where that leads to NaN, as a new run."""
        (trial,) = work.trials
        trial.tries += 1
        if cause == "nan":
            trial.run_id = f"{self.sweep_id}-{trial.number:05d}-{trial.tries}"
            self.ledger.sweeps.replace_run(self.sweep_id, trial.number, self._planner.resolve(trial).run)
        self._queue.append(work)

    def _settle_pack(self, work: Work, failure: str | None) -> None:
        """A pack is in the ledger as a whole; one that failed is not, and its trials run alone."""
        if failure is not None and not self.ledger.has(work.trials[0].run_id):
            self.ledger.sweeps.record(work.runs, [columns(self.sweep_id, trial) for trial in work.trials])
            pairs = zip(work.trials, work.configs, strict=True)
            self._queue.extend(Work((trial,), (config,)) for trial, config in pairs)
            return
        elsewhere = [trial.run_id for trial in work.trials if trial.outcome is None]  # in another process
        ended = self.ledger.sweeps.objective(elsewhere, self.section.metric)
        for trial in work.trials:
            if trial.outcome is None:
                trial.step, trial.value = ended.get(trial.run_id, (None, None))
                trial.outcome = outcome_of(trial.value)
            self._count(trial)

    def _count(self, trial: Trial, fresh: bool = True) -> None:
        counts = self.counts
        setattr(counts, str(trial.outcome), getattr(counts, str(trial.outcome)) + 1)
        counts.reused += trial.reused
        counts.fresh += fresh and not trial.reused
        best = None if counts.best is None else counts.best.value
        if trial.outcome == "finished" and better(self.section, trial.value, best):
            counts.best = trial

    def _load(self) -> None:
        """What the ledger has of this sweep; its trials without an outcome come first."""
        open_trials = []
        for record in self.ledger.sweeps.trials(self.sweep_id):
            trial = Trial(**{name: getattr(record, name) for name in _RECORDED})
            self._add(trial)
            if trial.outcome is None:
                open_trials.append(trial)
            else:
                self._count(trial, fresh=False)
            if not trial.reused:
                self._cost += record.seconds
        for trial in open_trials:
            self._queue.append(Work((trial,), (self._planner.resolve(trial).config,)))
        # A cell that was cut off while it was recorded is completed.
        for cells in self._cells:
            for cell in cells.values():
                if len(cell) < self.section.repeats:
                    whole = self._planner.trials(cell[0].cell, Suggestion(cell[0].values, cell[0].memory))
                    there = {trial.number for trial in cell}
                    lacking = [trial for trial in whole if trial.number not in there]
                    for trial in lacking:
                        self._add(trial)
                    self._enqueue([self._planner.resolve(trial) for trial in lacking])


_RECORDED = ("number", "cell", "seed", "values", "memory", "run_id", "reused", "outcome", "value", "step")
