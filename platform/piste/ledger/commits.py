"""Whether a transaction was committed whose COMMIT PostgreSQL has not acknowledged.

The last thing that a transaction does is to leave its session's mark in a table of its own; a session that
comes after it reads the mark. PostgreSQL's `pg_xact_status` cannot tell: after a crash the number of a
transaction that has left no trace is given to another one, which may have been committed.
"""

from __future__ import annotations

import time
import uuid
from typing import NamedTuple

from sqlalchemy import BigInteger, Column, Connection, Double, MetaData, String, Table, delete
from sqlalchemy.dialects.postgresql import Insert, insert

_MARKS = Table(
    "commits",
    MetaData(),
    Column("session", String, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("time", Double, nullable=False),
)
_KEPT_SECONDS = 86_400.0  # a mark is read within minutes, if ever


class Mark(NamedTuple):
    """What a transaction leaves behind: its session, and its number there."""

    session: str
    number: int


def make_marks(connection: Connection) -> None:
    """Makes the table of marks where it is absent, and removes those that nobody will read."""
    _MARKS.create(connection, checkfirst=True)
    connection.execute(delete(_MARKS).where(_MARKS.c.time < time.time() - _KEPT_SECONDS))


def leave_mark(connection: Connection) -> Mark:
    """Leaves the mark of a transaction that is about to be committed."""
    before: Mark = connection.info.get("mark") or Mark(uuid.uuid4().hex, 0)
    mark = connection.info["mark"] = Mark(before.session, before.number + 1)
    connection.execute(_upsert(mark, "number", "time"))
    return mark


def was_committed(connection: Connection, mark: Mark) -> bool:
    """Whether the transaction that has left this mark was committed; waits for it where it is still open."""
    found = connection.execute(_upsert(Mark(mark.session, 0), "time").returning(_MARKS.c.number))
    return bool(found.scalar_one() == mark.number)


def _upsert(mark: Mark, *changed: str) -> Insert:
    statement = insert(_MARKS).values(session=mark.session, number=mark.number, time=time.time())
    values = {name: statement.excluded[name] for name in changed}
    return statement.on_conflict_do_update(index_elements=["session"], set_=values)
