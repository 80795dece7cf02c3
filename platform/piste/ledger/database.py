"""The database under the ledger: opening, migrating, and its errors in one line."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from filelock import FileLock
from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    create_engine,
    event,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.schema import CreateColumn

from piste.errors import PisteError
from piste.home import home
from piste.ledger.tables import Base, Meta, Run

SCHEMA_VERSION = 3
BUSY_SECONDS = 30


class LedgerError(PisteError):
    """The ledger cannot be opened, read or written."""


def default_url() -> str:
    """The ledger in use: `PISTE_LEDGER`, or SQLite under piste's home."""
    return os.environ.get("PISTE_LEDGER") or f"sqlite:///{home() / 'ledger.db'}"


class Database:
    """One ledger database.

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
        with self.explained():
            _migrate(self._write, url)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that takes its lock at once."""
        with self.explained(), self._write.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for queries."""
        with self.explained(), self.engine.connect() as connection:
            yield connection

    def insert(self, table: type[Base]) -> Any:
        """An INSERT that knows ON CONFLICT, in the words of this database."""
        return (postgresql if self.engine.dialect.name == "postgresql" else sqlite).insert(table)

    def insert_many(
        self, connection: Connection, table: type[Base], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Inserts rows that all have the same columns.

        SQLite takes them past SQLAlchemy's handling of each parameter, which would cost more than the rows.
        """
        if not rows:
            return
        if connection.dialect.name != "sqlite":
            connection.execute(insert(table), list(rows))
            return
        columns = [table.__table__.c[name] for name in rows[0]]
        quoted = [connection.dialect.identifier_preparer.format_column(column) for column in columns]
        places = ", ".join("?" * len(columns))
        statement = f"INSERT INTO {table.__tablename__} ({', '.join(quoted)}) VALUES ({places})"
        holds_json = [isinstance(column.type, JSON) for column in columns]
        encode = json.JSONEncoder(allow_nan=False).encode
        values = [
            tuple(encode(v) if js else v for v, js in zip(row.values(), holds_json, strict=True))
            for row in rows
        ]
        connection.exec_driver_sql(statement, values)

    @contextmanager
    def explained(self) -> Iterator[None]:
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
    """Creates or upgrades the tables once, whoever comes first, and refuses a newer schema."""
    database = make_url(url).database
    local = write.dialect.name == "sqlite" and database
    with _alone(f"{database}.lock", url) if local else nullcontext():
        if local:
            _use_wal(write)
        with write.begin() as connection:
            if write.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(1)))
            version = select(Meta.value).where(Meta.key == "schema_version")
            known = inspect(connection).has_table(Meta.__tablename__)
            found = int(connection.execute(version).scalar_one()) if known else SCHEMA_VERSION
            if found <= SCHEMA_VERSION:
                Base.metadata.create_all(connection)
            if not known:
                connection.execute(insert(Meta).values(key="schema_version", value=str(SCHEMA_VERSION)))
            elif found < SCHEMA_VERSION:
                _upgrade(connection)
    if found > SCHEMA_VERSION:
        raise LedgerError(
            f"ledger {_shown(url)} has schema version {found}, newer than this piste's {SCHEMA_VERSION}: "
            "upgrade piste, or set PISTE_LEDGER to another ledger"
        )


def _upgrade(connection: Connection) -> None:
    """An older schema to this one: 1, before sweeps, lacks columns; 2, before jobs, a table alone."""
    present = {column["name"] for column in inspect(connection).get_columns(Run.__tablename__)}
    for column in Run.__table__.columns:
        if column.name not in present:
            definition = CreateColumn(cast(Column[Any], column)).compile(dialect=connection.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {Run.__tablename__} ADD COLUMN {definition}")
    for index in Run.__table__.indexes:  # type: ignore[attr-defined]
        index.create(connection, checkfirst=True)
    statement = update(Meta).where(Meta.key == "schema_version")
    connection.execute(statement.values(value=str(SCHEMA_VERSION)))
