"""The relay of a sweep: nested MLflow runs, sweep -> cell -> seed, laid out for MLflow's comparison page.

A sweep with one seed a cell has no cells of its own: its trials are nested in it directly. A packed sweep of
more than `MOST` trials has its best `BEST` as runs and all of them in a table, `trials.parquet`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from piste import catalog
from piste.ledger import Ledger, StoredRow, TrialRecord
from piste.ledger import Sweep as SweepRow
from piste.space import Sweep
from piste.tracking import (
    BATCH,
    MARK,
    TERMINAL,
    WHOLE,
    Relay,
    client,
    describe,
    find_or_create_experiment,
    metric_name,
    shown_metrics,
)
from piste.trials import better

if TYPE_CHECKING:
    import pandas
    from mlflow.entities import Param
    from mlflow.entities import Run as MlflowRun

MOST, BEST = 1_000, 200
PAGE = 1_000
SWEEP, CELL, TRIAL = "piste.sweep_id", "piste.sweep_cell", "piste.trial"


class SweepRelay:
    """Relays one sweep.

    Args:
        ledger: The ledger that has it.
        sweep_id: The sweep.
        uri: The MLflow store.
    """

    def __init__(self, ledger: Ledger, sweep_id: str, uri: str) -> None:
        self._ledger = ledger
        self._id = sweep_id
        self._uri = uri
        self._client = client(uri)
        self._experiment = ""
        self._cells: dict[int, str] = {}  # cell -> MLflow run
        self._trials: dict[int, MlflowRun] = {}  # trial -> MLflow run
        self._relays: dict[int, Relay] = {}
        self._whole: dict[int, str] = {}  # trial -> which end of it is shown
        self._closed: set[int] = set()
        self._best: float | None = None
        self._ended = 0
        self._complete = False
        self.mlflow_run_id: str | None = None

    def step(self) -> bool:
        """Pushes all that is new; returns whether the sweep has ended and is shown whole.

        Raises:
            Exception: Whatever MLflow's client raises; the same call may be repeated.
        """
        sweep = self._ledger.sweeps.get(self._id)  # before its trials: what it then lacks is really absent
        section = Sweep.model_validate(sweep.config["sweep"])
        if self.mlflow_run_id is None:
            self._find_or_create(sweep)
        if sweep.status not in TERMINAL and self._is_large(sweep, section):
            return False  # which are the best is known at the end
        trials = self._ledger.sweeps.trials(self._id)
        shown = trials
        if self._is_large(sweep, section):
            shown = _best(trials, section)
        for _, cell in groupby(shown, key=lambda trial: trial.cell):
            self._show_cell(sweep, section, list(cell))
        if sweep.status not in TERMINAL:
            return False
        self._finish(sweep, section, trials)
        self._complete = True
        return True

    def pending(self) -> int:
        """How many trials the view still lacks, or 1 where it lacks the sweep's end alone."""
        if self._complete:
            return 0
        count = self._ledger.sweeps.count(self._id)
        return max(1, min(count, MOST) - len(self._whole))

    def _is_large(self, sweep: SweepRow, section: Sweep) -> bool:
        packed = section.pack and hasattr(catalog.load_workload(sweep.workload), "train_many")
        return packed and self._ledger.sweeps.count(self._id) > MOST

    # -- the sweep ----------------------------------------------------------------------------------

    def _find_or_create(self, sweep: SweepRow) -> None:
        name = sweep.config["tracking"]["experiment"]
        self._experiment = find_or_create_experiment(self._client, self._uri, name)
        self._find_children()
        if self.mlflow_run_id is None:
            described = _sweep_tags(sweep)
            start = int(sweep.created * 1000)
            created = self._client.create_run(self._experiment, start, described, run_name=sweep.id)
            self.mlflow_run_id = created.info.run_id
        self._client.update_run(self.mlflow_run_id, status="RUNNING")
        describe(self._client, self.mlflow_run_id, sweep.config, sweep.directory, sweep.provenance)

    def _find_children(self) -> None:
        """What earlier relays have made of this sweep."""
        token = None
        while True:
            wanted = f"tags.`{SWEEP}` = '{self._id}'"
            page = self._client.search_runs([self._experiment], wanted, max_results=PAGE, page_token=token)
            for run in page:
                found = run.data.tags
                if TRIAL in found:
                    number = int(found[TRIAL])
                    self._trials[number] = run
                    if run.info.status in ("FINISHED", "FAILED"):
                        self._whole[number] = found.get(WHOLE, "")
                elif CELL in found:
                    self._cells[int(found[CELL])] = run.info.run_id
                else:
                    self.mlflow_run_id = run.info.run_id
            token = page.token
            if not token:
                return

    def _finish(self, sweep: SweepRow, section: Sweep, trials: Sequence[TrialRecord]) -> None:
        from piste.sweep_reporting import draw_all

        assert self.mlflow_run_id is not None
        folder = Path(sweep.directory) / "shown"
        folder.mkdir(exist_ok=True)
        for picture in draw_all(self._ledger, trials, section, folder):
            self._client.log_artifact(self.mlflow_run_id, str(picture), "pictures")
        table = _table(trials)
        if len(trials) > MOST:
            table.to_parquet(folder / "trials.parquet")
            self._client.log_artifact(self.mlflow_run_id, str(folder / "trials.parquet"))
        else:
            self._client.log_table(self.mlflow_run_id, table.astype(object), "trials.json")
        counts = {name: sum(t.outcome == name for t in trials) for name in ("finished", "pruned", "failed")}
        closing = {"piste.status": sweep.status, "piste.reason": sweep.error or ""}
        closing |= {f"piste.trials.{name}": str(count) for name, count in counts.items()}
        closing["piste.trials.reused"] = str(sum(t.reused for t in trials))
        for key, value in closing.items():
            self._client.set_tag(self.mlflow_run_id, key, value)
        ended = int((sweep.finished or time.time()) * 1000)
        self._client.set_terminated(self.mlflow_run_id, TERMINAL[sweep.status], ended)

    # -- cells and trials ---------------------------------------------------------------------------

    def _show_cell(self, sweep: SweepRow, section: Sweep, cell: list[TrialRecord]) -> None:
        number = cell[0].cell
        if number in self._closed or all(t.status == "planned" for t in cell):
            return
        parent = self.mlflow_run_id
        if section.repeats > 1:
            parent = self._cells.get(number) or self._open_cell(sweep, section, cell[0])
        assert parent is not None
        for trial in cell:
            if self._whole.get(trial.number) != _end(trial) and trial.status != "planned":
                self._show_trial(sweep, section, trial, parent)
        if all(self._whole.get(trial.number) == _end(trial) for trial in cell):
            if section.repeats > 1:
                self._close_cell(section, cell, parent)
            self._closed.add(number)

    def _open_cell(self, sweep: SweepRow, section: Sweep, trial: TrialRecord) -> str:
        identified = {SWEEP: sweep.id, CELL: str(trial.cell), "piste.kind": "cell"}
        identified["mlflow.parentRunId"] = self.mlflow_run_id or ""
        start = int(trial.created * 1000)
        run = self._client.create_run(self._experiment, start, identified, run_name=_title(trial))
        self._client.log_batch(run.info.run_id, params=_parameters(sweep, trial, seed=False))
        self._cells[trial.cell] = run.info.run_id
        return str(run.info.run_id)

    def _close_cell(self, section: Sweep, cell: Sequence[TrialRecord], mlflow_run_id: str) -> None:
        from mlflow.entities import Metric as View

        from piste.comparison import cells

        (summed,) = cells(cell, section.mode)
        now = int(max(trial.finished or trial.created for trial in cell) * 1000)
        found = {section.metric: summed.mean, "seeds": float(summed.n), "failed": float(summed.failed)}
        if summed.interval is not None:
            low, high = summed.interval
            found |= {f"{section.metric}/low": low, f"{section.metric}/high": high}
        metrics = [View(metric_name(k), v, now, 0) for k, v in found.items() if math.isfinite(v)]
        self._client.log_batch(mlflow_run_id, metrics=metrics)
        self._client.set_terminated(mlflow_run_id, "FAILED" if summed.n == 0 else "FINISHED", now)

    def _show_trial(self, sweep: SweepRow, section: Sweep, trial: TrialRecord, parent: str) -> None:
        run = self._trials.get(trial.number)
        if run is None:
            run = self._client.create_run(
                self._experiment,
                int(trial.created * 1000),
                self._trial_tags(sweep, trial, parent),
                run_name=_title(trial, seed=True),
            )
            self._trials[trial.number] = run
            if trial.outcome is None:
                self._client.log_batch(run.info.run_id, params=_parameters(sweep, trial))
        if trial.outcome is None:
            if trial.number not in self._relays:
                self._relays[trial.number] = Relay(self._ledger, trial.run_id, self._uri, run)
            self._relays[trial.number].step()
            return
        self._show_ended(sweep, trial, run)
        self._whole[trial.number] = _end(trial)
        self._relays.pop(trial.number, None)
        self._show_best(section, trial)

    def _show_ended(self, sweep: SweepRow, trial: TrialRecord, run: MlflowRun) -> None:
        """A trial that has ended: what its MLflow run still lacks, in as few requests as there can be."""
        from mlflow.entities import RunTag

        mlflow_run_id = run.info.run_id
        relay = self._relays.get(trial.number)
        mark = relay.mark if relay is not None else int(run.data.tags.get(MARK, 0))
        parameters: list[Param] = [] if mark else _parameters(sweep, trial)
        end = RunTag(WHOLE, _end(trial))
        for rows in self._rows(trial.run_id, mark, BATCH - len(parameters) - 1):
            metrics, marks = shown_metrics(rows)
            self._client.log_batch(mlflow_run_id, metrics=metrics, params=parameters, tags=[*marks, end])
            parameters = []
        if parameters:
            self._client.log_batch(mlflow_run_id, params=parameters, tags=[end])
        for artifact in self._ledger.artifacts(trial.run_id):
            if artifact.kind != "checkpoint" and Path(artifact.uri).exists():
                self._client.log_artifact(mlflow_run_id, artifact.uri)
        if trial.error:
            self._client.set_tag(mlflow_run_id, "piste.error", trial.error[:5000])
        status = "FAILED" if trial.outcome == "failed" else "FINISHED"
        self._client.set_terminated(mlflow_run_id, status, int((trial.finished or time.time()) * 1000))

    def _rows(self, run_id: str, mark: int, size: int) -> Iterator[list[StoredRow]]:
        while rows := self._ledger.metrics_after(run_id, mark, size):
            yield rows
            if len(rows) < size:
                return
            mark = rows[-1].id

    def _trial_tags(self, sweep: SweepRow, trial: TrialRecord, parent: str) -> dict[str, str]:
        named = {"piste.kind": "trial", SWEEP: sweep.id, TRIAL: str(trial.number)}
        named |= {"piste.run_id": trial.run_id, "mlflow.parentRunId": parent}
        if trial.reused:
            named["piste.reused"] = "the run was there already"
        return named

    def _show_best(self, section: Sweep, trial: TrialRecord) -> None:
        """The best objective so far, on the sweep's own run, against the number of trials that ended."""
        assert self.mlflow_run_id is not None
        self._ended += 1
        if trial.outcome == "finished" and better(section, trial.value, self._best):
            self._best = trial.value
            now = int((trial.finished or time.time()) * 1000)
            name = metric_name(f"best/{section.metric}")
            self._client.log_metric(self.mlflow_run_id, name, float(trial.value or 0.0), now, self._ended)


def _sweep_tags(sweep: SweepRow) -> dict[str, str]:
    origin = sweep.provenance
    searched = ", ".join(sweep.config["sweep"]["space"])
    note = (
        f"A sweep of **{sweep.workload}** over {searched}, from recipe `{sweep.recipe}`.\n\n"
        f"Compare its trials: `piste compare --sweep {sweep.id}`. Its resolved recipe is the artifact "
        "`recipe.toml`; its pictures and its table of trials are artifacts too."
    )
    named = {
        SWEEP: sweep.id,
        "piste.kind": "sweep",
        "piste.recipe": sweep.recipe,
        "piste.workload": sweep.workload,
        "piste.code_version": origin.get("code_version", ""),
        "piste.data_hash": origin.get("data_hash", ""),
        "piste.command": origin.get("command", ""),
        "mlflow.source.git.commit": origin.get("git", {}).get("commit", ""),
        "mlflow.note.content": note,
    }
    named |= {f"version.{name}": version for name, version in origin.get("libraries", {}).items()}
    return {key: value[:5000] for key, value in named.items() if value}


def _end(trial: TrialRecord) -> str:
    """Which end of a trial it is: one that was trained longer has another."""
    return f"{trial.outcome} at step {trial.step}"


def _parameters(sweep: SweepRow, trial: TrialRecord, seed: bool = True) -> list[Param]:
    """The searched values, and the optimizer's name where that is not one of them."""
    from mlflow.entities import Param

    named = {"optimizer.name": sweep.config["optimizer"]["name"], **trial.values}
    if seed:
        named["seed"] = trial.seed
    return [Param(key, str(value)[:6000]) for key, value in named.items()]


def _title(trial: TrialRecord, seed: bool = False) -> str:
    """What a reader of MLflow's list of runs tells it by."""
    values = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in trial.values.values()]
    if seed:
        return " ".join([f"#{trial.number}", *values, f"seed {trial.seed}"])
    return " ".join([f"cell {trial.cell}", *values])


def _best(trials: Sequence[TrialRecord], section: Sweep) -> list[TrialRecord]:
    """The best trials, in the order of their numbers."""
    sign = 1.0 if section.mode == "min" else -1.0
    finished = [t for t in trials if t.outcome == "finished" and t.value is not None]
    best = sorted(finished, key=lambda t: sign * (t.value or 0.0))[:BEST]
    return sorted(best, key=lambda t: t.number)


def _table(trials: Sequence[TrialRecord]) -> pandas.DataFrame:
    """One row a trial: its values, its seed, what came of it."""
    import pandas

    rows = [
        {
            "trial": t.number,
            "cell": t.cell,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in t.values.items()},
            "seed": t.seed,
            "outcome": t.outcome,
            "objective": t.value,
            "seconds": t.seconds,
            "run": t.run_id,
        }
        for t in trials
    ]
    return pandas.DataFrame(rows)
