"""The relay of a sweep: nested MLflow runs, sweep -> cell -> seed, laid out for MLflow's comparison pages.

A sweep with one seed a cell has no cells of its own: its trials are nested in it directly. A packed sweep of
more than `MOST` trials has the trials of its best cells as runs, `BEST` of them, and all in a table,
`trials.parquet`.

What MLflow has of a sweep is found by tags: `piste.sweep_id` on all of it, `piste.sweep_cell` on a cell,
`piste.trial` on a trial. The tag `piste.shown` says what came of a trial; it is shown whole where that agrees
with the ledger and its MLflow run has ended, which is the last of its requests.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from piste import catalog, sweep_view
from piste.ledger import Artifact, Ledger, TrialRecord
from piste.ledger import Sweep as SweepRow
from piste.space import Sweep
from piste.sweep_view import CELL, LONGEST, SWEEP, TRIAL
from piste.tracking import (
    MARK,
    TERMINAL,
    WHOLE,
    client,
    describe,
    find_or_create_experiment,
    flatten,
    metric_name,
    shown_metrics,
    view_key,
)
from piste.trials import better

if TYPE_CHECKING:
    from mlflow.entities import Param
    from mlflow.entities import Run as MlflowRun

MOST, BEST = 1_000, 200
PAGE = 1_000
# Rows of a batch: 1,000 entities less the tags that come with them.
ROWS = 1_000 - 7
ENDED = ("FINISHED", "FAILED")


@dataclass
class _Shown:
    """What MLflow has of a cell or a trial.

    Attributes:
        id: Its MLflow run.
        run_id: The ledger's run that a trial shows.
        status: As MLflow has it.
        end: Which end of it is shown.
        mark: The last of the ledger's rows that are shown; None: not even its parameters.
        files: Hash by name of the files that this relay has shown.
    """

    id: str
    run_id: str = ""
    status: str = "RUNNING"
    end: str = ""
    mark: int | None = None
    files: dict[str, str] = field(default_factory=dict)

    def is_whole(self, end: str) -> bool:
        """Whether this end is shown already."""
        return self.end == end and self.status in ENDED


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
        self._token = token_hex(8)
        self._known = False
        self.experiment_id = ""
        self._cells: dict[int, _Shown] = {}
        self._trials: dict[int, _Shown] = {}
        self._closed: set[int] = set()  # cells that are shown whole
        self._records: list[TrialRecord] = []
        self._read = -math.inf  # when they were read
        self._best_until = 0
        self._changed: dict[str, Any] = {}  # what the sweep has been given since it began
        self._end: str | None = None  # which end of the sweep is shown
        self.mlflow_run_id: str | None = None

    def step(self) -> bool:
        """Pushes all that is new; returns whether the sweep has ended and is shown whole.

        Raises:
            Exception: Whatever MLflow's client raises; the same call may be repeated.
        """
        sweep = self._ledger.sweeps.get(self._id)  # before its trials: what it then lacks is really absent
        section = Sweep.model_validate(sweep.config["sweep"])
        folder = Path(sweep.directory)
        folder.mkdir(parents=True, exist_ok=True)
        # One relay at a time: a driver's that drains, a resumed driver's, `piste sync`.
        with FileLock(folder / "relay.lock"):
            owner = folder / "relay.owner"
            # Another relay may have changed the view, or a request may have been lost.
            if not self._known or owner.read_text() != self._token:
                self._find_or_create(sweep, section)
                owner.write_text(self._token)
            self._known = False
            whole = self._show(sweep, section)
            self._known = True
        return whole

    def pending(self) -> int:
        """How many trials the view still lacks, or 1 where it lacks the sweep's end alone."""
        sweep = self._ledger.sweeps.get(self._id)
        if sweep.status in TERMINAL and self._end == _sweep_end(sweep):
            return 0
        section = Sweep.model_validate(sweep.config["sweep"])
        count = BEST if self._is_large(sweep, section) else self._ledger.sweeps.count(self._id)
        return max(1, count - sum(shown.status in ENDED for shown in self._trials.values()))

    def _show(self, sweep: SweepRow, section: Sweep) -> bool:
        if sweep.status in TERMINAL and self._end == _sweep_end(sweep):
            return True
        large = self._is_large(sweep, section)
        if sweep.status not in TERMINAL and large:
            return False  # which are the best is known at the end
        due = sweep.status in TERMINAL or self._is_due()
        if due:
            self._records = self._ledger.sweeps.trials(self._id)
            self._read = time.monotonic()
        trials = self._records
        for number, cell in groupby(_best(trials, section) if large else trials, key=lambda t: t.cell):
            if number not in self._closed:
                self._show_cell(sweep, section, list(cell))
        if due:
            self._show_best(sweep, section, trials)
        if sweep.status not in TERMINAL:
            return False
        self._finish(sweep, section, trials)
        return True

    def _is_large(self, sweep: SweepRow, section: Sweep) -> bool:
        if max(sweep.trials or 0, self._ledger.sweeps.count(self._id)) <= MOST:
            return False
        wanted = section.pack and section.scheduler == "fifo"
        return wanted and hasattr(catalog.load_workload(sweep.workload), "train_many")

    def _is_due(self) -> bool:
        """Whether to read the trials again: there are others, or one has gone on; many are read seldom."""
        if time.monotonic() - self._read < len(self._records) / 1000 - 1.0:
            return False
        if self._ledger.sweeps.count(self._id) != len(self._records):
            return True
        unsettled = (t for t in self._records if t.outcome is None)
        return any(self._ledger.run(t.run_id).status != t.status or t.status in TERMINAL for t in unsettled)

    # -- the sweep ----------------------------------------------------------------------------------

    def _find_or_create(self, sweep: SweepRow, section: Sweep) -> None:
        name = sweep.config["tracking"]["experiment"]
        self.experiment_id = find_or_create_experiment(self._client, self._uri, name)
        found = self._find()
        if found is None:
            view = json.dumps(sweep_view.view(sweep.id, section))
            self._client.set_experiment_tag(self.experiment_id, view_key(sweep.id), view)
            start = int(sweep.created * 1000)
            found = self._client.create_run(
                self.experiment_id, start, sweep_view.sweep_tags(sweep), run_name=sweep.id
            )
        self.mlflow_run_id = found.info.run_id
        ended = sweep.status in TERMINAL and found.data.tags.get(WHOLE) == _sweep_end(sweep)
        self._end = found.data.tags.get(WHOLE) if ended else None
        if MARK not in found.data.tags:
            describe(self._client, found.info.run_id, sweep.config, sweep.directory, sweep.provenance)
            self._client.set_tag(found.info.run_id, MARK, "0")
        else:  # MLflow never changes a parameter: what a longer sweep has instead is a tag
            flat = flatten({k: v for k, v in sweep.config.items() if k != "tracking"})
            then = found.data.params
            self._changed = {k: v for k, v in flat.items() if then.get(k) != str(v)[:6000]}
            for key, value in self._changed.items():
                self._client.set_tag(found.info.run_id, f"piste.now.{metric_name(key)}", str(value)[:5000])
        if not ended:
            self._client.update_run(found.info.run_id, status="RUNNING")

    def _find(self) -> MlflowRun | None:
        """What earlier relays have made of this sweep; returns its own MLflow run."""
        cells: dict[int, _Shown] = {}
        trials: dict[int, _Shown] = {}
        sweep, token = None, None
        while True:
            wanted = f"tags.`{SWEEP}` = '{self._id}'"
            page = self._client.search_runs([self.experiment_id], wanted, max_results=PAGE, page_token=token)
            for run in page:
                tags, mark = run.data.tags, run.data.tags.get(MARK)
                shown = _Shown(run.info.run_id, status=run.info.status, end=tags.get(WHOLE, ""))
                if CELL in tags:
                    cells[int(tags[CELL])] = shown
                elif TRIAL not in tags:
                    sweep = run
                elif int(tags[TRIAL]) in trials:  # a server has made it twice upon one request
                    self._client.delete_run(run.info.run_id)
                else:
                    shown.run_id = tags.get("piste.run_id") or tags.get("piste.reused", "")
                    shown.mark = None if mark is None else int(mark)
                    trials[int(tags[TRIAL])] = shown
            token = page.token
            if not token:
                break
        self._cells, self._trials, self._closed = cells, trials, set()
        self._read, self._best_until = -math.inf, 0
        return sweep

    def _show_best(self, sweep: SweepRow, section: Sweep, trials: Sequence[TrialRecord]) -> None:
        """The best objective of the first n trials, for each n up to the first trial that has not ended.

        The order is that of the numbers: what MLflow has cannot be taken back, and in this order no point
        depends on a trial that ends later. Only the steps before and at a change are shown, and the last.
        """
        from mlflow.entities import Metric as View

        assert self.mlflow_run_id is not None
        # Trials that were trained longer have other objectives: a series of its own.
        changes = [f"{k} {v}" for k, v in self._changed.items() if not k.startswith("sweep.")]
        name = metric_name("/".join(["best", section.metric, *changes]))
        points: dict[int, View] = {}
        best: float | None = None
        before: View | None = None
        for n, trial in enumerate(trials, 1):
            if trial.outcome is None:
                break
            improved = trial.outcome == "finished" and better(section, trial.value, best)
            if improved and before is not None:
                points[n - 1] = before
            best = trial.value if improved else best
            if best is not None:
                before = View(name, best, int((trial.finished or trial.created) * 1000), n)
                if improved or (n == len(trials) and sweep.status in TERMINAL):
                    points[n] = before
        new = [point for n, point in points.items() if n > self._best_until]
        for start in range(0, len(new), PAGE):
            self._client.log_batch(self.mlflow_run_id, metrics=new[start : start + PAGE])
            self._best_until = new[start : start + PAGE][-1].step

    def _finish(self, sweep: SweepRow, section: Sweep, trials: Sequence[TrialRecord]) -> None:
        from mlflow.entities import RunTag

        from piste.sweep_reporting import draw_all

        assert self.mlflow_run_id is not None
        folder = Path(sweep.directory) / "shown"
        folder.mkdir(exist_ok=True)
        for picture in draw_all(self._ledger, trials, section, folder):
            self._client.log_artifact(self.mlflow_run_id, str(picture), "pictures")
        closing = {"piste.status": sweep.status, "piste.reason": sweep.error or ""}
        counts = Counter(trial.outcome for trial in trials)
        closing |= {f"piste.trials.{o}": str(counts[o]) for o in ("finished", "pruned", "failed")}
        closing["piste.trials.reused"] = str(sum(trial.reused for trial in trials))
        table = sweep_view.table(trials)
        if len(trials) > MOST:
            from pyarrow import parquet  # type: ignore[import-untyped]

            parquet.write_table(table, folder / "trials.parquet")
            self._client.log_artifact(self.mlflow_run_id, str(folder / "trials.parquet"))
        else:
            rows = [[sweep_view.plain(value) for value in row.values()] for row in table.to_pylist()]
            listed = {"columns": table.column_names, "data": rows}
            self._client.log_text(self.mlflow_run_id, json.dumps(listed), "trials.json")
            closing["mlflow.loggedArtifacts"] = json.dumps([{"path": "trials.json", "type": "table"}])
        closing["mlflow.note.content"] = self._note(sweep, section, trials)
        tags = [RunTag(key, value[:LONGEST]) for key, value in closing.items()]
        self._client.log_batch(self.mlflow_run_id, tags=tags)
        for shown in (*self._trials.values(), *self._cells.values()):
            if shown.status not in (*ENDED, "KILLED"):  # the sweep has ended before it
                self._client.set_terminated(shown.id, "KILLED", int((sweep.finished or time.time()) * 1000))
                shown.status = "KILLED"
        ended = int((sweep.finished or time.time()) * 1000)
        self._client.set_terminated(self.mlflow_run_id, TERMINAL[sweep.status], ended)
        self._client.set_tag(self.mlflow_run_id, WHOLE, _sweep_end(sweep))
        self._end = _sweep_end(sweep)

    def _note(self, sweep: SweepRow, section: Sweep, trials: Sequence[TrialRecord]) -> str:
        from piste.comparison import cells

        ranked = [cell for cell in cells(trials, section.mode) if cell.n]
        runs: dict[int, list[str]] = defaultdict(list)
        for trial in trials:
            if trial.outcome == "finished" and trial.number in self._trials:
                runs[trial.cell].append(self._trials[trial.number].id)
        means = {number: shown.id for number, shown in self._cells.items()}
        return sweep_view.note(sweep, section, ranked, runs, means, self.experiment_id)

    # -- cells and trials ---------------------------------------------------------------------------

    def _show_cell(self, sweep: SweepRow, section: Sweep, cell: Sequence[TrialRecord]) -> None:
        number = cell[0].cell
        lacking = [trial for trial in cell if not self._is_shown(trial)]
        begun = [trial for trial in lacking if self._has_begun(trial)]
        parent = self.mlflow_run_id
        if section.repeats > 1 and (begun or self._lacks_end(cell, lacking)):
            parent = self._open_cell(sweep, cell[0])
        assert parent is not None
        for trial in begun:
            self._show_trial(sweep, section, trial, parent)
        if len(cell) == section.repeats and all(map(self._is_shown, cell)):
            if section.repeats > 1 and self._lacks_end(cell, ()):
                self._close_cell(section, cell)
            self._closed.add(number)

    def _has_begun(self, trial: TrialRecord) -> bool:
        """Whether there is anything to show of a trial; one that was planned may be interrupted, too."""
        if trial.outcome is None and trial.status == "interrupted":
            return trial.number in self._trials or self._ledger.count_after(trial.run_id) > 0
        return trial.status != "planned"

    def _lacks_end(self, cell: Sequence[TrialRecord], lacking: Sequence[TrialRecord]) -> bool:
        """Whether all seeds of a cell are shown, and not yet what came of it."""
        shown = self._cells.get(cell[0].cell)
        return not lacking and (shown is None or not shown.is_whole(_cell_end(cell)))

    def _is_shown(self, trial: TrialRecord) -> bool:
        shown = self._trials.get(trial.number)
        return shown is not None and shown.run_id == trial.run_id and shown.is_whole(_end(trial))

    def _open_cell(self, sweep: SweepRow, trial: TrialRecord) -> str:
        shown = self._cells.get(trial.cell)
        if shown is None:
            identified = {SWEEP: sweep.id, CELL: str(trial.cell), "piste.kind": "cell"}
            identified["mlflow.parentRunId"] = self.mlflow_run_id or ""
            start = int(trial.created * 1000)
            run = self._client.create_run(
                self.experiment_id, start, identified, run_name=sweep_view.title(trial)
            )
            shown = self._cells[trial.cell] = _Shown(run.info.run_id)
        elif shown.status != "RUNNING":
            self._client.update_run(shown.id, status="RUNNING")
            shown.status = "RUNNING"
        return shown.id

    def _close_cell(self, section: Sweep, cell: Sequence[TrialRecord]) -> None:
        from mlflow.entities import Metric as View
        from mlflow.entities import RunTag

        from piste.comparison import cells

        shown = self._cells[cell[0].cell]
        (summed,) = cells(cell, section.mode)
        ended = int(max(trial.finished or trial.created for trial in cell) * 1000)
        step = max(trial.step or 0 for trial in cell)
        found = {section.metric: summed.mean, "seeds": float(summed.n), "failed": float(summed.failed)}
        if summed.interval is not None:
            found |= dict(
                zip((f"{section.metric}/low", f"{section.metric}/high"), summed.interval, strict=True)
            )
        metrics = [View(metric_name(k), v, ended, step) for k, v in found.items() if math.isfinite(v)]
        parameters = _parameters(cell[0], seed=False)
        self._client.log_batch(
            shown.id, metrics=metrics, params=parameters, tags=[RunTag(WHOLE, _cell_end(cell))]
        )
        shown.status = "FAILED" if summed.n == 0 else "FINISHED"
        self._client.set_terminated(shown.id, shown.status, ended)
        shown.end = _cell_end(cell)

    def _show_trial(self, sweep: SweepRow, section: Sweep, trial: TrialRecord, parent: str) -> None:
        shown = self._trials.get(trial.number)
        if shown is not None and shown.run_id != trial.run_id:  # tried again as another run
            self._client.delete_run(shown.id)
            del self._trials[trial.number]
            shown = None
        files = self._files(sweep, trial)
        closing = {} if trial.outcome is None else _closing(trial, files)
        if shown is None:
            tags = {"piste.kind": "trial", SWEEP: sweep.id, TRIAL: str(trial.number)}
            # The run of a reused trial is shown where it was made.
            tags["piste.reused" if trial.reused else "piste.run_id"] = trial.run_id
            tags |= {"mlflow.parentRunId": parent, **closing}
            start, name = int(trial.created * 1000), sweep_view.title(trial, section.repeats > 1)
            run = self._client.create_run(self.experiment_id, start, tags, run_name=name)
            shown = self._trials[trial.number] = _Shown(run.info.run_id, trial.run_id)
            closing = {}
        elif shown.status != "RUNNING" and (trial.outcome is not None or trial.status == "running"):
            self._client.update_run(shown.id, status="RUNNING")
            shown.status = "RUNNING"
        for file in files:
            if shown.files.get(file.name) != file.sha256:
                where = Path(file.name).parent.as_posix()
                self._client.log_artifact(shown.id, file.uri, None if where == "." else where)
                shown.files[file.name] = file.sha256
        self._push(section, trial, shown, closing)
        if trial.outcome is not None:
            status = "FAILED" if trial.outcome == "failed" else "FINISHED"
            self._client.set_terminated(shown.id, status, int((trial.finished or time.time()) * 1000))
            shown.status, shown.end = status, _end(trial)

    def _files(self, sweep: SweepRow, trial: TrialRecord) -> list[Artifact]:
        """A trial's pictures and tables; one that was packed has no folder, and none."""
        if not trial.reused and not (Path(sweep.directory) / "trials" / f"{trial.number:05d}").exists():
            return []
        files = self._ledger.artifacts(trial.run_id)
        return [file for file in files if file.kind != "checkpoint" and Path(file.uri).exists()]

    def _push(self, section: Sweep, trial: TrialRecord, shown: _Shown, closing: Mapping[str, str]) -> None:
        """The parameters and rows that a trial's MLflow run lacks; with the last of them what came of it."""
        from mlflow.entities import RunTag

        while True:
            parameters = _parameters(trial) if shown.mark is None else []
            rows = self._ledger.metrics_after(trial.run_id, shown.mark or 0, ROWS - len(parameters))
            metrics, tags = shown_metrics(rows, section.metric) if rows else ([], [])
            last = len(rows) < ROWS - len(parameters)
            if trial.outcome is not None and last:
                # Tags take a third of a batch's time. Without its mark all of a trial is pushed again.
                tags = [tag for tag in tags if tag.key != MARK or shown.mark is not None]
                tags += [RunTag(key, value) for key, value in closing.items()]
            elif parameters and not rows:
                tags = [RunTag(MARK, "0")]
            if metrics or parameters or tags:
                self._client.log_batch(shown.id, metrics=metrics, params=parameters, tags=tags)
            shown.mark = rows[-1].id if rows else shown.mark or 0
            if last:
                return


def _sweep_end(sweep: SweepRow) -> str:
    """Which end of a sweep it is: a resumed one has another."""
    return f"{sweep.status} at {sweep.finished}"


def _end(trial: TrialRecord) -> str:
    """Which end of a trial it is: one that was trained longer has another."""
    return f"{trial.outcome} at step {trial.step}"


def _closing(trial: TrialRecord, files: Sequence[Artifact]) -> dict[str, str]:
    """The tags that say what came of a trial."""
    tags = {WHOLE: _end(trial), "piste.status": trial.outcome or ""}
    if trial.error:
        tags["piste.error"] = trial.error[:LONGEST]
    listed = [{"path": file.name, "type": "table"} for file in files if file.kind == "table"]
    return tags | ({"mlflow.loggedArtifacts": json.dumps(listed)} if listed else {})


def _cell_end(cell: Sequence[TrialRecord]) -> str:
    counted = Counter(map(_end, cell))
    return ", ".join(f"{number} {end}" for end, number in sorted(counted.items()))[:5000]


def _parameters(trial: TrialRecord, seed: bool = True) -> list[Param]:
    """The searched values: what differs, and nothing else."""
    from mlflow.entities import Param

    named = trial.values | ({"seed": trial.seed} if seed else {})
    return [Param(key, str(value)[:6000]) for key, value in named.items()]


def _best(trials: Sequence[TrialRecord], section: Sweep) -> list[TrialRecord]:
    """All trials of the best cells, `BEST` trials at most, in the order of their numbers."""
    from piste.comparison import cells

    ranked = [cell.number for cell in cells(trials, section.mode) if cell.n]
    chosen = set(ranked[: max(1, BEST // section.repeats)])
    return [trial for trial in trials if trial.cell in chosen]
