"""Creating and upgrading the tables, by one process, whoever comes first."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any, cast

from filelock import FileLock
from sqlalchemy import Column, Connection, Engine, func, insert, inspect, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateColumn

from piste.ledger import faults
from piste.ledger.commits import make_marks
from piste.ledger.faults import LedgerError
from piste.ledger.tables import Base, Meta, Run

SCHEMA_VERSION = 4


@contextmanager
def _alone(path: str, name: str) -> Iterator[None]:
    """One process at a time, by a lock file beside the database."""
    lock = FileLock(path, timeout=faults.BUSY_SECONDS)
    try:
        lock.acquire()
    except OSError as error:  # filelock's Timeout is one too
        cause = error.strerror or f"{path} is held, or cannot be made"
        fix = (
            "end the process that holds it, or set PISTE_HOME or PISTE_LEDGER to a place that can be written"
        )
        raise LedgerError(f"ledger {name}: {cause}: {fix}") from error
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


def migrate(write: Engine, url: str, name: str) -> None:
    """Creates or upgrades the tables once, whoever comes first, and refuses a newer schema."""
    database = make_url(url).database
    local = write.dialect.name == "sqlite" and database
    with _alone(f"{database}.lock", name) if local else nullcontext():
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
                if write.dialect.name == "postgresql":
                    make_marks(connection)
            if not known:
                connection.execute(insert(Meta).values(key="schema_version", value=str(SCHEMA_VERSION)))
            elif found < SCHEMA_VERSION:
                _upgrade(connection)
    if found > SCHEMA_VERSION:
        raise LedgerError(
            f"ledger {name} has schema version {found}, newer than this piste's {SCHEMA_VERSION}: "
            "upgrade piste, or set PISTE_LEDGER to another ledger"
        )


def _upgrade(connection: Connection) -> None:
    """An older schema to this one: 1, before sweeps, lacks columns; 2 and 3, tables (jobs, streams)."""
    present = {column["name"] for column in inspect(connection).get_columns(Run.__tablename__)}
    for column in Run.__table__.columns:
        if column.name not in present:
            definition = CreateColumn(cast(Column[Any], column)).compile(dialect=connection.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {Run.__tablename__} ADD COLUMN {definition}")
    for index in Run.__table__.indexes:  # type: ignore[attr-defined]
        index.create(connection, checkfirst=True)
    statement = update(Meta).where(Meta.key == "schema_version")
    connection.execute(statement.values(value=str(SCHEMA_VERSION)))
