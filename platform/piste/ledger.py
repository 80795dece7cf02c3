"""The ledger: every run, metric, artifact and checkpoint, in SQL. The ledger is the truth.

One writer per driver applies messages `(run, attempt, sequence, rows)` and acknowledges each after its
commit. Applying is idempotent: a row is inserted or ignored on `(run, key, step)`, so that a message
may be lost, doubled or late without a metric being lost or doubled. The first row keeps its value and
its timestamp; a recomputed row that differs is counted in `Run.recomputed_different`.
"""

from __future__ import annotations

import math
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from filelock import FileLock
from sqlalchemy import (
    JSON,
    BigInteger,
    Connection,
    Engine,
    ForeignKey,
    Index,
    Integer,
    UniqueConstraint,
    create_engine,
    event,
    func,
    insert,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from piste.errors import BadInput, PisteError
from piste.home import home

SCHEMA_VERSION = 1
# Metrics of the machine, not of the computation: a repeated run is not expected to repeat them.
WALL_CLOCK = ("time/", "system/")
BUSY_SECONDS = 30
ACTIVE = ("planned", "running")

_Id = BigInteger().with_variant(Integer, "sqlite")


class LedgerError(PisteError):
    """The ledger cannot be opened, read or written."""


class _Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON}  # noqa: RUF012 (SQLAlchemy's own protocol)


class Meta(_Base):
    """Facts about the database itself: its schema version."""

    __tablename__ = "meta"
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class Run(_Base):
    """One run of a recipe, over all its attempts."""

    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(primary_key=True)
    recipe: Mapped[str]
    workload: Mapped[str]
    seed: Mapped[int]
    config: Mapped[dict[str, Any]]
    provenance: Mapped[dict[str, Any]]
    identity: Mapped[str] = mapped_column(index=True)
    cell: Mapped[str] = mapped_column(index=True)
    directory: Mapped[str]
    status: Mapped[str] = mapped_column(index=True)
    attempt: Mapped[int] = mapped_column(default=0)
    driver: Mapped[str | None]
    created: Mapped[float]
    finished: Mapped[float | None]
    error: Mapped[str | None]
    recomputed_different: Mapped[int] = mapped_column(default=0)


class Metric(_Base):
    """One value of one metric. `value` is NULL where it is not finite; `special` then says which."""

    __tablename__ = "metrics"
    __table_args__ = (UniqueConstraint("run_id", "key", "step"), Index("metrics_of_run", "run_id", "id"))
    id: Mapped[int] = mapped_column(_Id, primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    key: Mapped[str]
    step: Mapped[int] = mapped_column(BigInteger)
    value: Mapped[float | None]
    special: Mapped[str | None]
    timestamp: Mapped[int] = mapped_column(BigInteger)


class Artifact(_Base):
    """A file of a run: a picture, a table, a checkpoint."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("run_id", "kind", "name"),)
    id: Mapped[int] = mapped_column(_Id, primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), index=True)
    kind: Mapped[str]
    name: Mapped[str]
    uri: Mapped[str]
    sha256: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    step: Mapped[int | None] = mapped_column(BigInteger)


class Row(NamedTuple):
    """A metric on its way to the ledger; the timestamp is in milliseconds since the epoch."""

    key: str
    step: int
    value: float
    timestamp: int


class StoredRow(NamedTuple):
    """A metric as the ledger keeps it: the columns of `Metric` without the run."""

    id: int
    key: str
    step: int
    value: float | None
    special: str | None
    timestamp: int


@dataclass(frozen=True)
class Message:
    """What a worker sends to the writer.

    Attributes:
        run_id: The run.
        attempt: The attempt that the sender belongs to; messages of an earlier attempt are fenced off.
        sequence: The sender's number for this message, echoed by the acknowledgement.
        rows: Metrics.
        artifacts: Files, as columns of `Artifact` without `run_id`.
    """

    run_id: str
    attempt: int
    sequence: int
    rows: tuple[Row, ...] = ()
    artifacts: tuple[dict[str, Any], ...] = ()


def default_url() -> str:
    """The ledger in use: `PISTE_LEDGER`, or SQLite under piste's home."""
    return os.environ.get("PISTE_LEDGER") or f"sqlite:///{home() / 'ledger.db'}"


class Ledger:
    """Reads and writes one ledger database.

    Args:
        url: Any SQLAlchemy URL; SQLite is put into WAL mode.

    Raises:
        LedgerError: It cannot be opened, is corrupt, or was written by a newer piste.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.engine = _engine(url)
            self._write = self.engine.execution_options(immediate=True)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise LedgerError(
                f"ledger {_shown(url)}: not a usable SQLAlchemy URL: {_one_line(error)}"
            ) from None
        with self._explained():
            _migrate(self._write, url)

    # -- writing ------------------------------------------------------------------------------------

    def create(self, **columns: Any) -> None:
        """Records a planned run; arguments are columns of `Run`."""
        with self._explained(), self._write.begin() as connection:
            connection.execute(
                insert(Run).values(status="planned", attempt=0, created=time.time(), **columns)
            )

    def begin_attempt(self, run_id: str) -> int:
        """Starts the next attempt of a run and fences off the ones before; returns its number."""
        with self._explained(), self._write.begin() as connection:
            statement = update(Run).where(Run.id == run_id)
            values = {"attempt": Run.attempt + 1, "status": "running", "error": None, "finished": None}
            return int(connection.execute(statement.values(values).returning(Run.attempt)).scalar_one())

    def claim(self, run_id: str, driver: str) -> None:
        """Makes a driver (`host:pid`) the owner of a run, which is planned again.

        How an earlier attempt ended says nothing of the next one.

        Raises:
            LedgerError: Another driver on this host is alive and running it.
        """
        with self._explained(), self._write.begin() as connection:
            owner, status = connection.execute(select(Run.driver, Run.status).where(Run.id == run_id)).one()
            host, _, pid = (owner or "").rpartition(":")
            elsewhere = owner != driver and host == driver.rpartition(":")[0]
            if status in ACTIVE and elsewhere and psutil.pid_exists(int(pid)):
                raise LedgerError(f"{run_id} is running in process {pid}: end that first")
            values = {"driver": driver, "status": "planned", "error": None, "finished": None}
            connection.execute(update(Run).where(Run.id == run_id).values(values))

    def set_status(self, run_id: str, status: str, error: str | None = None) -> None:
        """Sets a run's status (`finished`, `failed`, `interrupted`) and when it ended."""
        with self._explained(), self._write.begin() as connection:
            values = {"status": status, "error": error, "finished": time.time()}
            connection.execute(update(Run).where(Run.id == run_id).values(values))

    def apply(self, message: Message) -> int:
        """Commits a message and returns its sequence number: the acknowledgement.

        Raises:
            LedgerError: It could not be committed (the disk is full, the database is locked); nothing of
                the message was recorded and it can be sent again.
        """
        with self._explained(), self._write.begin() as connection:
            current = connection.execute(
                select(Run.attempt).where(Run.id == message.run_id)
            ).scalar_one_or_none()
            if current is None or message.attempt < current:
                return message.sequence
            if message.rows:
                different = self._insert_metrics(connection, message)
                if different:
                    total = Run.recomputed_different + different
                    statement = update(Run).where(Run.id == message.run_id)
                    connection.execute(statement.values(recomputed_different=total))
            for artifact in message.artifacts:
                self._upsert_artifact(connection, message.run_id, artifact)
        return message.sequence

    def _insert_metrics(self, connection: Connection, message: Message) -> int:
        """Inserts or ignores the rows; returns how many of the ignored differ from what is kept."""
        rows: dict[tuple[str, int], Row] = {}
        for row in message.rows:
            rows.setdefault((row.key, row.step), row)
        statement = self._insert(Metric).on_conflict_do_nothing(index_elements=["run_id", "key", "step"])
        result = connection.execute(statement, [_columns(message.run_id, row) for row in rows.values()])
        if result.rowcount == len(rows):
            return 0
        kept = connection.execute(
            select(Metric.key, Metric.step, Metric.value, Metric.special).where(
                Metric.run_id == message.run_id, tuple_(Metric.key, Metric.step).in_(list(rows))
            )
        )
        return sum(
            (value, special) != _stored(rows[key, step].value)
            for key, step, value, special in kept
            if not key.startswith(WALL_CLOCK)
        )

    def _insert(self, table: type[_Base]) -> Any:
        """An INSERT that knows ON CONFLICT, in the words of this database."""
        return (postgresql if self.engine.dialect.name == "postgresql" else sqlite).insert(table)

    def _upsert_artifact(self, connection: Connection, run_id: str, artifact: Mapping[str, Any]) -> None:
        statement = self._insert(Artifact).values(run_id=run_id, **artifact)
        keys = ["run_id", "kind", "name"]
        connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=dict(artifact)))

    # -- reading ------------------------------------------------------------------------------------

    def run(self, run_id: str) -> Run:
        """The run of that id, or the only one whose id begins so.

        Raises:
            BadInput: No run, or several runs, have it.
        """
        with self._explained(), Session(self.engine) as session:
            found = session.scalars(
                select(Run).where(Run.id.startswith(run_id, autoescape=True)).limit(2)
            ).all()
        exact = [run for run in found if run.id == run_id] or found
        if len(exact) != 1:
            count = "no run has" if not found else "several runs begin with"
            raise BadInput(f"{count} id {run_id!r} in {self.url}; `piste ls runs` shows them")
        return exact[0]

    def runs(self, limit: int | None = None) -> list[Run]:
        """The newest runs first."""
        with self._explained(), Session(self.engine) as session:
            return list(session.scalars(select(Run).order_by(Run.created.desc()).limit(limit)))

    def metrics_after(self, run_id: str, high_water_mark: int, limit: int) -> list[StoredRow]:
        """The run's next metrics behind a high-water mark, in the order of their commit."""
        columns = [getattr(Metric, name) for name in StoredRow._fields]
        query = select(*columns).where(Metric.run_id == run_id, Metric.id > high_water_mark)
        with self._explained(), self.engine.connect() as connection:
            return [StoredRow(*row) for row in connection.execute(query.order_by(Metric.id).limit(limit))]

    def count_after(self, run_id: str, high_water_mark: int = 0) -> int:
        """How many metrics of a run lie behind a high-water mark."""
        query = select(func.count()).where(Metric.run_id == run_id, Metric.id > high_water_mark)
        with self._explained(), self.engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def last_values(self, run_id: str) -> dict[str, float]:
        """Each metric's value at its last step."""
        last = select(Metric.key, func.max(Metric.step).label("step")).where(Metric.run_id == run_id)
        newest = last.group_by(Metric.key).subquery()
        query = select(Metric).join(newest, (Metric.key == newest.c.key) & (Metric.step == newest.c.step))
        with self._explained(), Session(self.engine) as session:
            found = session.scalars(query.where(Metric.run_id == run_id).order_by(Metric.key)).all()
        return {metric.key: number(metric) for metric in found}

    def history(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """All values of one metric as `(step, value)`, by step."""
        query = select(Metric).where(Metric.run_id == run_id, Metric.key == key).order_by(Metric.step)
        with self._explained(), Session(self.engine) as session:
            return [(metric.step, number(metric)) for metric in session.scalars(query)]

    def keys(self, run_id: str) -> list[str]:
        """The names of the metrics that a run has."""
        query = select(Metric.key).where(Metric.run_id == run_id).distinct().order_by(Metric.key)
        with self._explained(), self.engine.connect() as connection:
            return list(connection.scalars(query))

    def artifacts(self, run_id: str) -> list[Artifact]:
        """The run's files, in the order of their recording."""
        query = select(Artifact).where(Artifact.run_id == run_id).order_by(Artifact.id)
        with self._explained(), Session(self.engine) as session:
            return list(session.scalars(query))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns a database's exception into one line with cause and fix."""
        try:
            yield
        except OperationalError as error:
            cause = _one_line(error.orig or error)
            fixes = {
                "locked": f"another process has held it for {BUSY_SECONDS} s; end it and try again",
                "full": "free disk space, then `piste resume` continues",
                "readonly": "make it writable, or set PISTE_HOME or PISTE_LEDGER to a place that is",
                "unable to open": "set PISTE_HOME or PISTE_LEDGER to a place that can be written",
                "i/o error": "the disk is full or failing; free space, then `piste resume` continues",
            }
            fix = next((fix for word, fix in fixes.items() if word in cause.lower()), "check PISTE_LEDGER")
            raise LedgerError(f"ledger {_shown(self.url)}: {cause}: {fix}") from error
        except DatabaseError as error:
            cause = _one_line(error.orig or error)
            damaged = "malformed" in cause or "not a database" in cause
            fix = (
                "move the file away (a new one is made) or restore a copy"
                if damaged
                else "check PISTE_LEDGER"
            )
            raise LedgerError(f"ledger {_shown(self.url)}: {cause}: {fix}") from error


def open_ledger() -> Ledger:
    """The ledger in use."""
    return Ledger(default_url())


def number(metric: Metric | StoredRow) -> float:
    """A metric's value, `nan` and `inf` included."""
    return float(metric.special or "nan") if metric.value is None else metric.value


def _stored(value: float) -> tuple[float | None, str | None]:
    """How a value is stored: SQLite would turn NaN into NULL, so that non-finite ones go by name."""
    return (value, None) if math.isfinite(value) else (None, str(value))


def _columns(run_id: str, row: Row) -> dict[str, Any]:
    value, special = _stored(row.value)
    return {
        "run_id": run_id,
        "key": row.key,
        "step": row.step,
        "value": value,
        "special": special,
        "timestamp": row.timestamp,
    }


def _one_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]


def _shown(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    if parsed.database:
        try:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "set PISTE_HOME or PISTE_LEDGER to a place that can be written"
            raise LedgerError(f"ledger {url}: {error.strerror}: {fix}") from None
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _manual_transactions(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # sqlite3 leaves BEGIN to us

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer takes its lock at once: a transaction that reads first and writes later would fail
        # without waiting when another process has written in between.
        immediate = connection.get_execution_options().get("immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


@contextmanager
def _alone(path: str, url: str) -> Iterator[None]:
    """One process at a time, by a lock file beside the database."""
    lock = FileLock(path, timeout=BUSY_SECONDS)
    try:
        lock.acquire()
    except OSError as error:  # filelock's Timeout is one too
        cause = error.strerror or f"{path} is held, or cannot be made"
        fix = (
            "end the process that holds it, or set PISTE_HOME or PISTE_LEDGER to a place that can be written"
        )
        raise LedgerError(f"ledger {_shown(url)}: {cause}: {fix}") from error
    try:
        yield
    finally:
        lock.release()


def _use_wal(write: Engine) -> None:
    statement = "PRAGMA journal_mode=WAL"
    try:
        with closing(write.raw_connection()) as raw:  # outside any transaction
            raw.cursor().execute(statement)
    except sqlite3.Error as error:  # raw: SQLAlchemy has not put it into its own terms
        raise DBAPIError.instance(statement, None, error, sqlite3.Error) from error


def _migrate(write: Engine, url: str) -> None:
    """Creates the tables once, whoever comes first, and refuses a newer schema."""
    database = make_url(url).database
    local = write.dialect.name == "sqlite" and database
    with _alone(f"{database}.lock", url) if local else nullcontext():
        if local:
            _use_wal(write)
        with write.begin() as connection:
            if write.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(SCHEMA_VERSION)))
            _Base.metadata.create_all(connection)
            version = select(Meta.value).where(Meta.key == "schema_version")
            found = connection.execute(version).scalar_one_or_none()
            if found is None:
                connection.execute(insert(Meta).values(key="schema_version", value=str(SCHEMA_VERSION)))
    if found is not None and int(found) > SCHEMA_VERSION:
        raise LedgerError(
            f"ledger {_shown(url)} has schema version {found}, newer than this piste's {SCHEMA_VERSION}: "
            "upgrade piste, or set PISTE_LEDGER to another ledger"
        )
