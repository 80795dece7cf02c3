"""The database under the ledger: opening it, its transactions, and its errors in one line."""

from __future__ import annotations

import logging
import os
import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import Session

from piste.home import home
from piste.ledger import faults
from piste.ledger.commits import Mark, leave_mark, was_committed
from piste.ledger.faults import LedgerError, LostCall, explanation, is_lost, patiently
from piste.ledger.migration import migrate
from piste.ledger.tables import Base, Job, Run, Sweep

# A host that is cut off is noticed within half a minute, by both ends, and its open transaction then keeps
# no one from writing. The server's times are in milliseconds, but for those of its keep-alive packets.
_KEEP_ALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
_SESSION = {
    "idle_in_transaction_session_timeout": 20_000,
    "lock_timeout": 1000 * faults.BUSY_SECONDS,
    "tcp_user_timeout": 30_000,
    **{f"tcp_{name}": value for name, value in _KEEP_ALIVE.items()},
}
_POSTGRESQL = {
    "connect_timeout": 10,
    "tcp_user_timeout": 30_000,
    **_KEEP_ALIVE,
    "options": " ".join(f"-c {name}={value}" for name, value in _SESSION.items()),
}
_USABLE = "use sqlite:///FILE or postgresql+psycopg://ROLE@HOST/DATABASE"

Named = TypeVar("Named", Run, Sweep, Job)


def default_url() -> str:
    """The ledger in use: `PISTE_LEDGER`, or SQLite under piste's home."""
    return os.environ.get("PISTE_LEDGER") or f"sqlite:///{home() / 'ledger.db'}"


class Database:
    """One ledger database.

    Args:
        url: SQLite, which is put into WAL mode, or PostgreSQL.
        patient: It was opened before, by another process: wait for it where it cannot be reached.

    Raises:
        LedgerError: It cannot be opened, is corrupt, or was written by a newer piste.
    """

    def __init__(self, url: str, patient: bool = False) -> None:
        self.url = url
        self.engine = _engine(url)
        self._write = self.engine.execution_options(immediate=True)
        self._is_known = patient
        # Connections are not left to the garbage collector, which warns of them.
        weakref.finalize(self, self.engine.dispose)
        patiently(self._migrate)
        self._is_known = True

    @property
    def name(self) -> str:
        """Its URL, without a password."""
        return _shown(self.url)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that takes its lock at once; when this is left, it is committed."""
        mark: Mark | None = None
        with self.explained():
            try:
                with self._write.begin() as connection:
                    yield connection
                    mark = leave_mark(connection) if connection.dialect.name == "postgresql" else None
            except DBAPIError:
                # With its mark it was COMMIT that failed: of the acknowledgement alone, perhaps.
                if mark is None or not patiently(partial(self._was_committed, mark)):
                    raise

    def _was_committed(self, mark: Mark) -> bool:
        with self.reading() as connection:
            return was_committed(connection, mark)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for queries."""
        with self.explained(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session for queries of whole rows."""
        with self.explained(), Session(self.engine) as session:
            yield session

    def beginning(self, table: type[Named], row_id: str) -> Sequence[Named]:
        """The row of that id, else the rows whose ids begin so, two at most."""
        with self.session() as session:
            exact = session.get(table, row_id)
            query = select(table).where(table.id.startswith(row_id, autoescape=True)).limit(2)
            return [exact] if exact is not None else session.scalars(query).all()

    def insert(self, table: type[Base]) -> Any:
        """An INSERT that knows ON CONFLICT, in the words of this database."""
        return (postgresql if self.engine.dialect.name == "postgresql" else sqlite).insert(table)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turns a database's exception into one line with cause and fix."""
        try:
            yield
        except DBAPIError as error:
            message = f"ledger {self.name}: {explanation(error)}"
            lost = self._is_known and self.engine.dialect.name == "postgresql" and is_lost(error)
            raise (LostCall if lost else LedgerError)(message) from error

    def _migrate(self) -> None:
        with self.explained():
            migrate(self._write, self.url, self.name)


def without_password(url: str) -> tuple[str, dict[str, str]]:
    """A ledger's URL without its password, and the environment in which PostgreSQL's client finds that."""
    given = make_url(url)
    bare = given.difference_update_query(["password"])
    if given.password is None and bare == given:
        return url, {}
    secret = given.password or given.query["password"]
    plain = URL.create(bare.drivername, bare.username, None, bare.host, bare.port, bare.database, bare.query)
    return plain.render_as_string(), {"PGPASSWORD": str(secret)}


def _shown(url: str) -> str:
    shown = re.sub(r"(:/*[^:@/]*):.*@", r"\1:***@", url)
    return re.sub(r"password=[^&]*", "password=***", shown)


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise LedgerError(f"ledger {_shown(url)}: not a URL: {_USABLE}") from None
    if parsed.drivername in {"sqlite", "sqlite+pysqlite"}:
        return _sqlite(parsed)
    if parsed.drivername not in {"postgresql", "postgresql+psycopg"}:
        raise LedgerError(f"ledger {_shown(url)}: not a database that piste knows: {_USABLE}")
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # it warns of what it then raises, too
    chosen = {key: value for key, value in _POSTGRESQL.items() if key not in parsed.query}
    try:
        named = parsed.set(drivername="postgresql+psycopg")
        return create_engine(named, pool_pre_ping=True, connect_args=chosen)
    except ImportError as error:
        cause = str(error).partition("\n")[0]
        fix = "pip install 'piste[postgres]'"
        raise LedgerError(f"ledger {_shown(url)}: psycopg is missing ({cause}): {fix}") from None


def _sqlite(url: URL) -> Engine:
    if url.database:
        try:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "set PISTE_HOME or PISTE_LEDGER to a place that can be written"
            raise LedgerError(f"ledger {url}: {error.strerror}: {fix}") from None
    engine = create_engine(url, connect_args={"timeout": faults.BUSY_SECONDS})

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
