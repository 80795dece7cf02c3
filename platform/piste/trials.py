"""One trial of a sweep: what it is, the recipe that it runs, and how two are told better from worse."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from piste import catalog, packing, provenance
from piste.config import Recipe, override, validate
from piste.errors import BadInput
from piste.ledger import Ledger, Row, TrialRecord, metric_columns, stored
from piste.ledger import Sweep as SweepRow
from piste.search import Suggestion
from piste.space import Sweep, Values

Outcome = Literal["finished", "pruned", "failed"]
Rows = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]


@dataclass
class Trial:
    """One trial as this process knows it: the ledger's `Trial`, its seed, its tries, its computing time.

    Attributes:
        tries: How often it was tried again.
        preemptions: How often it was stopped because its host was taken away.
        seconds: How long its run has computed.
    """

    number: int
    cell: int
    seed: int
    values: Values
    memory: dict[str, Any] | None
    run_id: str
    reused: bool = False
    outcome: str | None = None
    value: float | None = None
    step: int | None = None
    tries: int = 0
    preemptions: int = 0
    seconds: float = 0.0


class Planned(NamedTuple):
    """A trial with its recipe (None where its values do not fit together) and the columns of its run."""

    trial: Trial
    config: Recipe | None
    run: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What an executor computes at a time: one trial's run, or a pack of trials as one program.

    Attributes:
        trials: One trial, or a pack.
        configs: Their resolved recipes.
        runs: Columns of the packed trials' runs, which are recorded with their results; empty for one trial,
            whose run is in the ledger already.
    """

    trials: tuple[Trial, ...]
    configs: tuple[Recipe | None, ...]
    runs: tuple[dict[str, Any], ...] = ()

    @property
    def packed(self) -> bool:
        """Whether it is a pack."""
        return bool(self.runs)


class Planner:
    """From a trial's values to its recipe and its run.

    Args:
        row: The sweep.
        section: Its `[sweep]`.
    """

    def __init__(self, row: SweepRow, section: Sweep) -> None:
        self.module = catalog.load_workload(row.workload)
        self.base = override({k: v for k, v in row.config.items() if k != "sweep"}, section.constants)
        self._row = row
        self._repeats = section.repeats
        self._code_versions: dict[tuple[str, ...], str] = {}
        self._data: dict[str, str] = {}
        self._provenance: dict[tuple[str, str], dict[str, str]] = {}  # one object for all that share it

    def trials(self, cell: int, suggestion: Suggestion) -> list[Trial]:
        """The trials of a cell, not yet run."""
        first = int(suggestion.values.get("seed", self.base["seed"]))
        numbers = range(cell * self._repeats, (cell + 1) * self._repeats)
        return [
            Trial(
                number=number,
                cell=cell,
                seed=first + number % self._repeats,
                values=suggestion.values,
                memory=suggestion.memory,
                run_id=f"{self._row.id}-{number:05d}",
            )
            for number in numbers
        ]

    def resolve(self, trial: Trial) -> Planned:
        """A trial with its recipe and the columns of its run; it has failed where its values do not fit."""
        table = override(self.base, {**trial.values, "seed": trial.seed})
        run = {
            "id": trial.run_id,
            "recipe": self._row.recipe,
            "workload": self._row.workload,
            "seed": trial.seed,
            "directory": f"{self._row.directory}/trials/{trial.number:05d}",
            "attempt": 0,
            "driver": None,
            "created": time.time(),
            "recomputed_different": 0,
            "sweep_id": self._row.id,
            "started": None,
            "seconds": 0.0,
        }
        try:
            config: Recipe = validate(self.module.Config, table, trial.run_id)
            code, data = self._origin(trial, config)
        except BadInput as error:
            trial.outcome = "failed"
            nothing = {"config": table, "provenance": {}, "identity": "", "cell": "", "status": "failed"}
            return Planned(trial, None, run | nothing | {"error": str(error), "finished": time.time()})
        resolved = config.model_dump(mode="json", exclude={"sweep"})
        identity, cell = provenance.identify(resolved, code, data)
        return Planned(
            trial,
            config,
            run
            | {
                "config": resolved,
                "provenance": self._provenance.setdefault(
                    (code, data), {"code_version": code, "data_hash": data}
                ),
                "identity": identity,
                "cell": cell,
                "status": "planned",
                "error": None,
                "finished": None,
            },
        )

    def _origin(self, trial: Trial, config: Recipe) -> tuple[str, str]:
        """Code version and data hash; the data is prepared once for all trials that share it."""
        optimizers = tuple(section.name for section in config.optimizer.chain)
        if optimizers not in self._code_versions:
            packages = provenance.code_packages(config)
            self._code_versions[optimizers] = provenance.code_version(packages)
        code = self._code_versions[optimizers]
        if not hasattr(self.module, "prepare_data"):
            return code, ""
        decisive = {k: v for k, v in trial.values.items() if not k.startswith("optimizer.")}
        key = json.dumps([decisive, trial.seed], sort_keys=True)
        if key not in self._data:
            self._data[key] = self.module.prepare_data(config)
        return code, self._data[key]


def columns(sweep_id: str, trial: Trial) -> dict[str, Any]:
    """The columns of a trial in the ledger."""
    value, special = (None, None) if trial.value is None else stored(trial.value)
    return {
        "sweep_id": sweep_id,
        "number": trial.number,
        "cell": trial.cell,
        "values": trial.values,
        "memory": trial.memory,
        "run_id": trial.run_id,
        "reused": trial.reused,
        "outcome": trial.outcome,
        "value": value,
        "special": special,
        "step": trial.step,
    }


def compute_pack(section: Sweep, work: Work) -> tuple[Rows, list[packing.Measurement]]:
    """Computes a pack.

    Args:
        section: The sweep's `[sweep]`.
        work: The pack.

    Returns:
        Its runs, trials and metrics as rows of the ledger; and what it has cost.
    """
    configs = [config for config in work.configs if config is not None]
    whole = section.history or (section.bisect is not None and section.bisect.limit is None)
    device = "cuda" if configs[0].resources.gpus_per_worker > 0 else "cpu"
    module, seeds = catalog.load_workload(configs[0].workload), [trial.seed for trial in work.trials]
    packed = packing.run_pack(module, configs, seeds, device, history=whole)
    logged, metric = packed.values(), section.metric
    seconds = sum(each.seconds for each in packed.measured)
    now = time.time()
    ended = {"status": "finished", "attempt": 1, "finished": now, "seconds": seconds / len(work.trials)}
    metrics = []
    for key, (steps, values) in logged.items():
        for step, row in zip(steps, values.tolist(), strict=True):
            for trial, value in zip(work.trials, row, strict=True):
                metrics.append(metric_columns(trial.run_id, Row(key, step, value, int(now * 1000))))
    if metric in logged:
        steps, values = logged[metric]
        for trial, value in zip(work.trials, values[-1].tolist(), strict=True):
            trial.step, trial.value = steps[-1], value
    for trial in work.trials:
        trial.outcome = outcome_of(trial.value)
    sweep_id = work.runs[0]["sweep_id"]
    runs = [{**run, **ended} for run in work.runs]
    return (runs, [columns(sweep_id, trial) for trial in work.trials], metrics), packed.measured


def is_closed(cell: Sequence[Trial]) -> bool:
    """Whether all trials of a cell have an outcome."""
    return all(trial.outcome is not None for trial in cell)


def outcome_of(value: float | None) -> Outcome:
    """What came of a trial that ran to its end: it has failed without a finite objective."""
    return "finished" if value is not None and math.isfinite(value) else "failed"


def better(section: Sweep, value: float | None, than: float | None) -> bool:
    """Whether an objective is better than another, or than none."""
    if value is None or not math.isfinite(value):
        return False
    return than is None or (value < than if section.mode == "min" else value > than)


def converged(ledger: Ledger, section: Sweep, trial: Trial | TrialRecord) -> bool:
    """Whether a trial ended with a finite objective that is better than the limit, or than it began."""
    if trial.outcome != "finished" or section.bisect is None:
        return False
    limit = section.bisect.limit
    if limit is None:
        limit = ledger.history(trial.run_id, section.metric)[0][1]
    return better(section, trial.value, limit)
