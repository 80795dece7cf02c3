"""Rows by the thousand, past SQLAlchemy's handling of each parameter, which would cost more than the rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import JSON, Connection
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError

from piste.ledger.tables import Base, Metric

_COLUMNS = [column for column in Metric.__table__.columns if column.name != "id"]


def insert_many(connection: Connection, table: type[Base], rows: Sequence[Mapping[str, Any]]) -> None:
    """Inserts rows that all have the same columns."""
    if not rows:
        return
    columns = [table.__table__.c[name] for name in rows[0]]
    quoted = ", ".join(connection.dialect.identifier_preparer.format_column(column) for column in columns)
    places = [place for place, column in enumerate(columns) if isinstance(column.type, JSON)]
    values = _encoded(rows, places)
    if connection.dialect.name == "postgresql":
        _copy(connection, f"COPY {table.__tablename__} ({quoted}) FROM STDIN", values)
    else:
        marks = ", ".join("?" * len(columns))
        statement = f"INSERT INTO {table.__tablename__} ({quoted}) VALUES ({marks})"
        connection.exec_driver_sql(statement, list(values))


def _encoded(rows: Sequence[Mapping[str, Any]], json_places: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """The values of each row, those at some places as JSON; what rows share is encoded once."""
    encode = json.JSONEncoder(allow_nan=False).encode
    known: dict[int, str] = {}  # by identity: the rows keep all of them alive
    for row in rows:
        values = list(row.values())
        for place in json_places:
            value = values[place]
            text = known.get(id(value))
            if text is None:
                text = known[id(value)] = encode(value)
            values[place] = text
        yield tuple(values)


def insert_absent(connection: Connection, metrics: Sequence[Mapping[str, Any]]) -> int:
    """Inserts the metrics that are not there yet; returns how many."""
    if connection.dialect.name != "postgresql":
        absent = sqlite.insert(Metric).on_conflict_do_nothing(index_elements=["run_id", "key", "step"])
        return int(connection.execute(absent, list(metrics)).rowcount)
    # One statement for all of them: a statement a row takes several times as long.
    columns = {c: f"%({c.name})s::{c.type.compile(connection.dialect)}[]" for c in _COLUMNS}
    names = ", ".join(connection.dialect.identifier_preparer.format_column(c) for c in columns)
    statement = f"INSERT INTO metrics ({names}) SELECT * FROM unnest({', '.join(columns.values())})"
    values = {c.name: [metric[c.name] for metric in metrics] for c in columns}
    return connection.exec_driver_sql(f"{statement} ON CONFLICT DO NOTHING", values).rowcount


def _copy(connection: Connection, statement: str, values: Iterable[tuple[Any, ...]]) -> None:
    """Sends rows to PostgreSQL; its errors are put into SQLAlchemy's terms."""
    raw, failure = connection.connection, connection.dialect.loaded_dbapi.Error
    try:
        with raw.cursor() as cursor, cursor.copy(statement) as copy:  # type: ignore[attr-defined]
            for row in values:
                copy.write_row(row)
    except failure as error:
        lost = connection.dialect.is_disconnect(error, raw, None)
        if lost:
            connection.invalidate(error)
        raise DBAPIError.instance(statement, None, error, failure, connection_invalidated=lost) from error
