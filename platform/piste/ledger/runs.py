"""Runs, their metrics and files: one writer, idempotent messages."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil
from sqlalchemy import Connection, func, insert, select, tuple_, update

from piste.errors import BadInput
from piste.ledger.bulk import insert_absent
from piste.ledger.database import Database
from piste.ledger.faults import LedgerError, repeats_lost_calls
from piste.ledger.tables import (
    ACTIVE,
    WALL_CLOCK,
    Artifact,
    Job,
    Message,
    Metric,
    Row,
    Run,
    StoredRow,
    Sweep,
    metric_columns,
    number,
    stored,
)


@repeats_lost_calls
class Runs(Database):
    """Reads and writes runs."""

    # -- writing ------------------------------------------------------------------------------------

    def create(self, **columns: Any) -> None:
        """Records a planned run; arguments are columns of `Run`."""
        with self.writing() as connection:
            connection.execute(
                insert(Run).values(status="planned", attempt=0, created=time.time(), **columns)
            )

    def begin_attempt(self, run_id: str) -> int:
        """Starts the next attempt of a run and fences off the ones before; returns its number."""
        with self.writing() as connection:
            values = {"attempt": Run.attempt + 1, "status": "running", "error": None, "finished": None}
            values |= _clock(time.time()) | {"started": time.time()}
            statement = update(Run).where(Run.id == run_id).values(values)
            return int(connection.execute(statement.returning(Run.attempt)).scalar_one())

    def claim(self, run_id: str, driver: str) -> None:
        """Makes a driver (`host:pid`) the owner of a run, which is planned again.

        How an earlier attempt ended says nothing of the next one.

        Raises:
            BadInput: It has finished in the meantime.
            LedgerError: Another driver on this host is alive and running it.
        """
        with self.writing() as connection:
            if claim(connection, Run, run_id, driver) == "finished":
                raise BadInput(f"{run_id} has finished: `piste rerun {run_id}` repeats it")
            # An attempt whose driver is gone has stopped at a time that nobody knows.
            connection.execute(update(Run).where(Run.id == run_id).values(started=None))

    def set_status(self, run_id: str, status: str, error: str | None = None) -> None:
        """Sets a run's status (`finished`, `failed`, `interrupted`, `pruned`) and when it ended.

        A pruned run stays so, whatever its workers report while they are being ended.
        """
        now = time.time()
        with self.writing() as connection:
            values = {"status": status, "error": error, "finished": now, **_clock(now), "started": None}
            ending = update(Run).where(Run.id == run_id, Run.status != "pruned")
            connection.execute(ending.values(values))

    def apply(self, message: Message) -> int:
        """Commits a message and returns its sequence number: the acknowledgement.

        Raises:
            LedgerError: It could not be committed (the disk is full, the database is locked); nothing of
                the message was recorded and it can be sent again.
        """
        with self.writing() as connection:
            # The relay follows a run's rows by their ids, which PostgreSQL gives out before it commits: its
            # writers wait for each other, a new one for the open transaction of one that was given up, too.
            mine = select(Run.attempt).where(Run.id == message.run_id)
            current = connection.execute(mine.with_for_update(key_share=True)).scalar_one_or_none()
            if current is None or message.attempt < current:
                return message.sequence
            insert_rows(connection, message.run_id, message.rows)
            for artifact in message.artifacts:
                self._upsert_artifact(connection, message.run_id, artifact)
        return message.sequence

    def _upsert_artifact(self, connection: Connection, run_id: str, artifact: Mapping[str, Any]) -> None:
        statement = self.insert(Artifact).values(run_id=run_id, **artifact)
        keys = ["run_id", "kind", "name"]
        connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=dict(artifact)))

    # -- reading ------------------------------------------------------------------------------------

    def run(self, run_id: str) -> Run:
        """The run of that id, or the only one whose id begins so.

        Raises:
            BadInput: No run, or several runs, have it.
        """
        found = self.beginning(Run, run_id)
        if len(found) != 1:
            count = "no run has" if not found else "several runs begin with"
            raise BadInput(f"{count} id {run_id!r} in {self.name}; `piste ls runs` shows them")
        return found[0]

    def has(self, run_id: str) -> bool:
        """Whether there is a run of exactly that id."""
        with self.reading() as connection:
            return connection.execute(select(Run.id).where(Run.id == run_id)).first() is not None

    def lost_driver(self, run_id: str) -> str | None:
        """The driver (`host:pid`) of a run that is open, where it was a process of this host and is gone.

        A run of a sweep has the sweep's. What runs on other hosts is not known here.
        """
        run = self.run(run_id)
        driver = run.driver
        if run.sweep_id is not None:
            with self.reading() as connection:
                driver = connection.scalar(select(Sweep.driver).where(Sweep.id == run.sweep_id))
        host, _, pid = (driver or "").rpartition(":")
        here = run.status in ACTIVE and host == os.uname().nodename
        return driver if here and not _is_alive(int(pid)) else None

    def runs(self, limit: int | None = None) -> list[Run]:
        """The newest runs first, without those of sweeps."""
        query = select(Run).where(Run.sweep_id.is_(None)).order_by(Run.created.desc())
        with self.session() as session:
            return list(session.scalars(query.limit(limit)))

    def finished(self, workload: str, limit: int) -> list[Run]:
        """The newest finished runs of a workload, those of sweeps included."""
        query = select(Run).where(Run.workload == workload, Run.status == "finished")
        with self.session() as session:
            return list(session.scalars(query.order_by(Run.created.desc()).limit(limit)))

    def metrics_after(
        self, run_id: str, high_water_mark: int, limit: int, key: str | None = None
    ) -> list[StoredRow]:
        """The run's next metrics, or those of one name, behind a high-water mark; as they were committed."""
        fields = [getattr(Metric, name) for name in StoredRow._fields]
        query = select(*fields).where(Metric.run_id == run_id, Metric.id > high_water_mark)
        query = query if key is None else query.where(Metric.key == key)
        with self.reading() as connection:
            return [StoredRow(*row) for row in connection.execute(query.order_by(Metric.id).limit(limit))]

    def count_after(self, run_id: str, high_water_mark: int = 0) -> int:
        """How many metrics of a run lie behind a high-water mark."""
        query = select(func.count()).where(Metric.run_id == run_id, Metric.id > high_water_mark)
        with self.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def last_values(self, run_id: str) -> dict[str, float]:
        """Each metric's value at its last step."""
        last = select(Metric.key, func.max(Metric.step).label("step")).where(Metric.run_id == run_id)
        newest = last.group_by(Metric.key).subquery()
        query = select(Metric).join(newest, (Metric.key == newest.c.key) & (Metric.step == newest.c.step))
        with self.session() as session:
            found = session.scalars(query.where(Metric.run_id == run_id)).all()
        return dict(sorted((metric.key, number(metric)) for metric in found))

    def history(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """All values of one metric as `(step, value)`, by step."""
        query = select(Metric).where(Metric.run_id == run_id, Metric.key == key).order_by(Metric.step)
        with self.session() as session:
            return [(metric.step, number(metric)) for metric in session.scalars(query)]

    def keys(self, run_id: str) -> list[str]:
        """The names of the metrics that a run has."""
        query = select(Metric.key).where(Metric.run_id == run_id).distinct()
        with self.reading() as connection:
            return sorted(connection.scalars(query))  # each PostgreSQL has an order of its own for words

    def provenance(self, run: Run) -> dict[str, Any]:
        """Where a run comes from: its own facts over those that its sweep's runs share."""
        if run.sweep_id is None:
            return run.provenance
        with self.reading() as connection:
            query = select(Sweep.provenance).where(Sweep.id == run.sweep_id)
            return {**connection.execute(query).scalar_one(), **run.provenance}

    def artifacts(self, run_id: str) -> list[Artifact]:
        """The run's files, in the order of their recording."""
        query = select(Artifact).where(Artifact.run_id == run_id).order_by(Artifact.id)
        with self.session() as session:
            return list(session.scalars(query))


def insert_rows(connection: Connection, run_id: str, offered: Sequence[Row]) -> None:
    """Inserts or ignores metrics; of the ignored, those that differ from what is kept are counted."""
    rows: dict[tuple[str, int], Row] = {}
    for row in offered:
        rows.setdefault((row.key, row.step), row)
    columns = [metric_columns(run_id, row) for row in rows.values()]
    if not rows or insert_absent(connection, columns) == len(rows):
        return
    kept = connection.execute(
        select(Metric.key, Metric.step, Metric.value, Metric.special).where(
            Metric.run_id == run_id, tuple_(Metric.key, Metric.step).in_(list(rows))
        )
    )
    different = sum(
        (value, special) != stored(rows[key, step].value)
        for key, step, value, special in kept
        if not key.startswith(WALL_CLOCK)
    )
    if different:
        total = Run.recomputed_different + different
        connection.execute(update(Run).where(Run.id == run_id).values(recomputed_different=total))


def claim(connection: Connection, table: type[Run] | type[Sweep], row_id: str, driver: str) -> str:
    """Makes a driver (`host:pid`) the owner of a run or sweep, which is planned again; returns what it was.

    Raises:
        LedgerError: Another driver on this host is alive and running it.
    """
    query = select(table.driver, table.status).where(table.id == row_id).with_for_update(key_share=True)
    owner, status = connection.execute(query).one()
    host, _, pid = (owner or "").rpartition(":")
    elsewhere = owner != driver and host == driver.rpartition(":")[0]
    if status in ACTIVE and elsewhere and _is_alive(int(pid)):
        raise LedgerError(f"{row_id} is running in process {pid}: end that first")
    values = {"driver": driver, "status": "planned", "error": None, "finished": None}
    connection.execute(update(table).where(table.id == row_id).values(values))
    if (job := os.environ.get("PISTE_JOB")) is not None:  # a study claims several: it is the subject itself
        fresh = update(Job).where(Job.id == job, Job.subject.is_(None))
        connection.execute(fresh.values(subject=row_id))
    return str(status)


def _is_alive(pid: int) -> bool:
    """Whether a process of this host runs; one that was killed, and that nobody has waited for, does not."""
    if not psutil.pid_exists(pid):
        return False
    with suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return True


def _clock(now: float) -> dict[str, Any]:
    """Adds the time of the attempt that ends now, where one is running."""
    return {"seconds": Run.seconds + now - func.coalesce(Run.started, now)}
