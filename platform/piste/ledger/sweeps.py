"""Sweeps and their trials."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row as SqlRow
from sqlalchemy import func, insert, select, update

from piste.errors import BadInput
from piste.ledger.bulk import insert_many
from piste.ledger.database import Database
from piste.ledger.faults import repeats_lost_calls
from piste.ledger.runs import claim
from piste.ledger.tables import Metric, Run, Sweep, Trial, TrialRecord, number, stored

# SQLite takes 32,766 values in one statement.
CHUNK = 10_000
_TRIAL = ("number", "cell", "values", "memory", "run_id", "reused", "outcome", "value", "special", "step")
_RUN = ("seed", "status", "error", "created", "finished", "seconds")


@repeats_lost_calls
class Sweeps:
    """Reads and writes sweeps.

    Args:
        database: The ledger's database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    # -- writing ------------------------------------------------------------------------------------

    def create(self, **columns: Any) -> None:
        """Records a planned sweep; arguments are columns of `Sweep`."""
        with self._database.writing() as connection:
            connection.execute(insert(Sweep).values(status="planned", created=time.time(), **columns))

    def claim(self, sweep_id: str, driver: str) -> None:
        """Makes a driver the owner of a sweep, and of its runs that have not ended.

        Raises:
            LedgerError: Another driver on this host is alive and running it.
        """
        with self._database.writing() as connection:
            claim(connection, Sweep, sweep_id, driver)
            connection.execute(update(Sweep).where(Sweep.id == sweep_id).values(status="running"))
            open_runs = (Run.sweep_id == sweep_id, Run.status.in_(("running", "interrupted")))
            values = {"status": "planned", "started": None, "finished": None, "error": None}
            connection.execute(update(Run).where(*open_runs).values(values))

    def end(self, sweep_id: str, status: str, seconds: float, error: str | None = None) -> None:
        """Ends a session of a sweep: its status, and how long the session took."""
        now = time.time()
        values = {"status": status, "error": error, "finished": now, "seconds": Sweep.seconds + seconds}
        with self._database.writing() as connection:
            connection.execute(update(Sweep).where(Sweep.id == sweep_id).values(values))
            if status == "interrupted":
                open_runs = (Run.sweep_id == sweep_id, Run.status.in_(("planned", "running")))
                stopped = {"status": status, "started": None, "finished": now}
                connection.execute(update(Run).where(*open_runs).values(stopped))

    def extend(self, sweep_id: str, trials: int | None, config: dict[str, Any]) -> None:
        """Gives a sweep another number of trials."""
        with self._database.writing() as connection:
            values = {"trials": trials, "config": config}
            connection.execute(update(Sweep).where(Sweep.id == sweep_id).values(values))

    def lengthen(self, sweep_id: str, config: dict[str, Any], runs: Sequence[dict[str, Any]]) -> None:
        """Opens trials that have ended, so that their runs go on with other recipes.

        Args:
            sweep_id: The sweep.
            config: The sweep's recipe from now on.
            runs: Columns of `Run` that change, with its `id`.
        """
        with self._database.writing() as connection:
            connection.execute(update(Sweep).where(Sweep.id == sweep_id).values(config=config))
            for run in runs:
                opened = {"status": "planned", "finished": None, **run}
                connection.execute(update(Run).where(Run.id == run["id"]).values(opened))
                mine = (Trial.sweep_id == sweep_id, Trial.run_id == run["id"])
                connection.execute(update(Trial).where(*mine).values(outcome=None))

    def record(
        self,
        runs: Sequence[dict[str, Any]],
        trials: Sequence[dict[str, Any]],
        metrics: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Records trials with their runs in one transaction, planned ones or a whole pack that has ended.

        Args:
            runs: Columns of `Run`; those of reused trials are there already and are not repeated.
            trials: Columns of `Trial`.
            metrics: Columns of `Metric`.
        """
        with self._database.writing() as connection:
            for table, rows in ((Run, runs), (Trial, trials), (Metric, metrics)):
                insert_many(connection, table, rows)

    def settle(
        self, sweep_id: str, trial: int, outcome: str, value: float | None, step: int | None = None
    ) -> None:
        """Records what came of a trial; `value` is the objective, None where there is none."""
        kept, special = (None, None) if value is None else stored(value)
        values = {"outcome": outcome, "value": kept, "special": special, "step": step}
        with self._database.writing() as connection:
            statement = update(Trial).where(Trial.sweep_id == sweep_id, Trial.number == trial)
            connection.execute(statement.values(values))

    def replace_run(self, sweep_id: str, trial: int, run: dict[str, Any]) -> None:
        """Gives a trial another run; the first stays in the ledger."""
        with self._database.writing() as connection:
            connection.execute(insert(Run), [run])
            statement = update(Trial).where(Trial.sweep_id == sweep_id, Trial.number == trial)
            connection.execute(statement.values(run_id=run["id"]))

    # -- reading ------------------------------------------------------------------------------------

    def get(self, sweep_id: str) -> Sweep:
        """The sweep of that id, or the only one whose id begins so.

        Raises:
            BadInput: No sweep, or several sweeps, have it.
        """
        found = self._database.beginning(Sweep, sweep_id)
        if len(found) != 1:
            count = "no sweep has" if not found else "several sweeps begin with"
            raise BadInput(f"{count} id {sweep_id!r}; `piste ls sweeps` shows them")
        return found[0]

    def newest(self, limit: int | None = None) -> list[Sweep]:
        """The newest sweeps first."""
        query = select(Sweep).order_by(Sweep.created.desc()).limit(limit)
        with self._database.session() as session:
            return list(session.scalars(query))

    def trials(self, sweep_id: str) -> list[TrialRecord]:
        """A sweep's trials in the order of their numbers."""
        columns = [getattr(Trial, name) for name in _TRIAL] + [getattr(Run, name) for name in _RUN]
        query = select(*columns).join(Run, Run.id == Trial.run_id).where(Trial.sweep_id == sweep_id)
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(query.order_by(Trial.number))]

    def count(self, sweep_id: str) -> int:
        """How many trials a sweep has."""
        query = select(func.count()).where(Trial.sweep_id == sweep_id)
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def reusable(self, identities: Sequence[str], metric: str) -> dict[str, tuple[str, int, float]]:
        """Finished runs that are the same trial: `{identity: (run id, last step, last value of metric)}`.

        A run whose metric ended as no finite number is none: whether it is tried again is the sweep's to say.
        """
        found: dict[str, str] = {}
        with self._database.reading() as connection:
            for start in range(0, len(identities), CHUNK):
                chunk = identities[start : start + CHUNK]
                query = select(Run.identity, Run.id).where(Run.identity.in_(chunk), Run.status == "finished")
                newest_last = connection.execute(query.order_by(Run.created))
                found |= {row.identity: row.id for row in newest_last}
        last = self.objective(list(found.values()), metric)
        ended = {run_id: of_run for run_id, of_run in last.items() if math.isfinite(of_run[1])}
        return {identity: (run_id, *ended[run_id]) for identity, run_id in found.items() if run_id in ended}

    def objective(self, run_ids: Sequence[str], key: str) -> dict[str, tuple[int, float]]:
        """The last step and value of a metric, for the runs that have it."""
        found: dict[str, tuple[int, float]] = {}
        with self._database.reading() as connection:
            for start in range(0, len(run_ids), CHUNK):
                mine = (Metric.run_id.in_(run_ids[start : start + CHUNK]), Metric.key == key)
                last = select(Metric.run_id, func.max(Metric.step).label("step")).where(*mine)
                newest = last.group_by(Metric.run_id).subquery()
                same = (Metric.run_id == newest.c.run_id) & (Metric.step == newest.c.step)
                rows = select(Metric.run_id, Metric.step, Metric.value, Metric.special).join(newest, same)
                for row in connection.execute(rows.where(Metric.key == key)):
                    found[row.run_id] = (row.step, number(row))  # type: ignore[arg-type]
        return found


def _record(row: SqlRow[Any]) -> TrialRecord:
    value = None if row.value is None and row.special is None else number(row)  # type: ignore[arg-type]
    names = [n for n in TrialRecord._fields if n not in {"value"}]
    return TrialRecord(value=value, **{name: getattr(row, name) for name in names})
