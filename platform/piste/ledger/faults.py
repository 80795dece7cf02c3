"""What a database refuses, in one line of cause and fix; and what it loses, which is tried again."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import DBAPIError, OperationalError

from piste.errors import PisteError

BUSY_SECONDS = 30
PATIENCE_SECONDS = 60.0

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class LedgerError(PisteError):
    """The ledger cannot be opened, read or written."""


class LostCall(LedgerError):
    """The database has gone away, and what it was asked for was not committed."""


_WRITABLE = "set PISTE_HOME or PISTE_LEDGER to a place that can be written"
_FULL = "free disk space, then `piste resume` continues"
_DAMAGED = "move the file away (a new one is made) or restore a copy"
_FIXES = {
    "locked": "another process has held it for {busy} s; end it and try again",
    "lock timeout": "another session holds it; end it and try again",
    "no space left": _FULL,
    "full": _FULL,
    "readonly": f"make it writable, or {_WRITABLE}",
    "unable to open": _WRITABLE,
    "i/o error": f"the disk is full or failing; {_FULL}",
    "malformed": _DAMAGED,
    "not a database": _DAMAGED,
    "connection refused": "start PostgreSQL there, or correct PISTE_LEDGER",
    "password": "write its password into the file that PGPASSFILE names, which you alone may read",
    "failed to resolve": "correct the host in PISTE_LEDGER",
    "does not exist": "create it with `createdb`, or correct PISTE_LEDGER",
    "permission denied": "let the role own the database",
    "for type json": "PostgreSQL takes no inf or nan there: write a finite number",
    "too many": "raise max_connections of PostgreSQL, or end other runs",
}


def explanation(error: DBAPIError) -> str:
    """A database's exception in one line: the cause and the fix."""
    cause = str(error.orig or error).strip().partition("\n")[0]
    fix = next((fix for word, fix in _FIXES.items() if word in cause.lower()), "check PISTE_LEDGER")
    return f"{cause}: {fix.format(busy=BUSY_SECONDS)}"


def is_lost(error: DBAPIError) -> bool:
    """Whether PostgreSQL has gone away, or has ended a transaction in favour of another one."""
    refused = isinstance(error, OperationalError) and error.statement is None  # it was about to connect
    return error.connection_invalidated or refused or "deadlock detected" in str(error.orig)


def patiently(call: Callable[[], R]) -> R:
    """Makes a call again while it is lost, for `PATIENCE_SECONDS` from the first loss.

    Raises:
        LedgerError: The database has not come back; a call around this one does not wait again.
    """
    give_up: float | None = None
    pause = 0.05
    while True:
        try:
            return call()
        except LostCall as error:
            give_up = give_up or time.monotonic() + PATIENCE_SECONDS
            if time.monotonic() + pause >= give_up:
                raise LedgerError(str(error)) from error
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def repeats_lost_calls(owner: type[T]) -> type[T]:
    """A class whose public methods outlive a restart of PostgreSQL: each is made again while it is lost.

    What that promises: a call returns after its transaction was committed, exactly once, or raises.
    A transaction that ends before its COMMIT was sent is rolled back by the server, and one whose COMMIT
    was not acknowledged is looked up there (`commits`), so that only what was not committed is made again.
    What it asks: a public method has one `writing` block at most, and nothing else that it does is harmed
    by being done again. SQLite loses no calls.
    """
    for name, method in list(vars(owner).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(owner, name, _patient(method))
    return owner


def _patient(method: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(method)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        return patiently(lambda: method(*arguments, **options))

    return call
