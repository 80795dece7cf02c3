"""What a run's history must be: dictionaries beside the ledger, and a ledger that tells them what happens."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.platform.counted import KEYS
from tests.platform.simulated import Process, World, alive, current, fault, pause

from piste.ledger import Ledger, LedgerError, Message

Place = tuple[str, int]
ACTIVE = {"planned", "running"}


class Stored(NamedTuple):
    """A row of the ledger's metrics, as plain SQL gives it."""

    id: int
    key: str
    step: int
    value: str
    timestamp: int


@dataclass
class Expected:
    """What the ledger must say of one run."""

    id: str
    directory: Path
    steps: int
    status: str = "planned"
    attempt: int = 0
    owner: Process | None = None
    first: dict[Place, tuple[str, int]] = field(default_factory=dict)  # repr(value), timestamp
    different: set[tuple[int, Place]] = field(default_factory=set)  # attempt, place
    counted: int = 0  # the same, and again for each time that such a row came

    def is_ending(self) -> bool:
        """Whether it has ended and its driver has not yet."""
        return self.owner is not None and not self.owner.dead and self.status not in ACTIVE

    def durable(self) -> int:
        """The newest step that a checkpoint has seen."""
        found = (self.directory / "checkpoints").glob("step-*")
        return max((int(p.name.removeprefix("step-")) for p in found), default=0)

    def lacking(self) -> set[Place]:
        """What a checkpoint has seen, so that nobody computes it again."""
        return set(itertools.product(KEYS, range(1, self.durable() + 1))) - self.first.keys()


class Model:
    """The expectations, and how often each thing has happened."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.runs: dict[str, Expected] = {}
        self.met: Counter[str] = Counter()

    # -- what happens -------------------------------------------------------------------------------

    def created(self, run_id: str, directory: str, steps: int) -> None:
        self.runs[run_id] = Expected(run_id, Path(directory), steps)

    def claimed(self, run_id: str) -> None:
        run, me = self.runs[run_id], self._process()
        self.world.note(f"claims {run_id}")
        self.world.expect(run.status != "finished", "a finished run was claimed")
        if run.owner is not None and run.owner is not me and run.status in ACTIVE:
            busy = not run.owner.dead and run.owner.host == me.host
            self.world.expect(not busy, "a run was claimed while its driver was alive")
            self.met["taken over"] += 1
        run.owner, run.status = me, "planned"

    def begun(self, run_id: str, attempt: int) -> None:
        run, process = self.runs[run_id], self._process()
        self.world.note(f"begins attempt {attempt} of {run_id}")
        self.world.expect(process.driver is run.owner, "a driver that is not the run's began an attempt")
        self.world.expect(run.status != "finished", "an attempt of a finished run was begun")
        run.attempt += 1
        self.world.expect(attempt == run.attempt, "an attempt has another's number")
        run.status, process.attempt = "running", attempt

    def ended(self, run_id: str, status: str) -> None:
        """Somebody says how a run has ended: its driver, or a worker of the newest attempt."""
        run, process = self.runs[run_id], self._process()
        self.world.note(f"says of {run_id} that it has {status}")
        worker = process.kind == "worker"
        if process.driver is not run.owner or (worker and process.attempt != run.attempt):
            self.met["an end told by somebody superseded"] += 1
        elif not worker or run.status in ACTIVE:
            run.status = status

    def applied(self, message: Message) -> None:
        run = self.runs[message.run_id]
        places = [f"{row.key}@{row.step}" for row in message.rows]
        files = [str(artifact["name"]) for artifact in message.artifacts]
        number = f"attempt {message.attempt}, message {message.sequence}"
        self.world.note(f"{run.id} takes {number}: {' '.join(places + files)}")
        if message.attempt < run.attempt:
            self.met["a message of an earlier attempt"] += 1
            return
        for row in message.rows:
            place, value = (row.key, row.step), repr(row.value)
            if run.first.setdefault(place, (value, row.timestamp))[0] != value and "/" not in row.key:
                run.different.add((message.attempt, place))
                run.counted += 1
                self.met["a row that differs"] += 1

    def refused(self, message: Message) -> None:
        early = message.attempt < self.runs[message.run_id].attempt
        self.world.expect(early, "a message of the newest attempt was refused")
        self.met["a message of an earlier attempt"] += 1

    @staticmethod
    def _process() -> Process:
        task = current()
        assert task is not None
        return task.process

    # -- what must be -------------------------------------------------------------------------------

    def check(self, plain: sqlite3.Connection) -> dict[str, list[Stored]]:
        """The ledger says what it must, and has all that a checkpoint has seen; returns its metrics."""
        found = {}
        for run in self.runs.values():
            columns = "status, attempt, driver, recomputed_different, error, finished, seconds, created"
            row = plain.execute(f"select {columns} from runs where id = ?", (run.id,)).fetchone()
            status, attempt, driver, different, error, finished, seconds, created = row
            owner = None if run.owner is None else f"{run.owner.host}:{run.owner.pid}"
            assert (status, attempt, driver) == (run.status, run.attempt, owner)
            assert len(run.different) <= different <= run.counted
            assert (error is not None) == (status in {"failed", "interrupted"})
            assert (finished is not None) == (status not in ACTIVE)
            assert 0.0 <= seconds <= self.world.now - created + 1e-6
            rows = "select id, key, step, value, special, timestamp from metrics where run_id = ? order by id"
            stored = [
                Stored(i, key, step, repr(value) if value is not None else special, stamp)
                for i, key, step, value, special, stamp in plain.execute(rows, (run.id,))
            ]
            kept = {(m.key, m.step): (m.value, m.timestamp) for m in stored}
            assert len(stored) == len(kept), "a metric is there twice"
            assert kept == run.first
            assert not run.lacking(), "a checkpoint has seen metrics that the ledger does not have"
            found[run.id] = stored
        return found


class SimulatedLedger(Ledger):
    """The ledger; its transactions are places where others may go first, and where it may fail."""

    def __init__(self, url: str, model: Model) -> None:
        super().__init__(url)
        self._model = model

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        alive()
        with super().explained():
            yield

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        pause()
        what = fault("before", "after")
        if what == "before":
            raise LedgerError("ledger: the disk is full")
        yield
        if what == "after":
            raise LedgerError("ledger: the connection broke off after the commit")

    def create(self, **columns: Any) -> None:
        super().create(**columns)
        self._model.created(columns["id"], columns["directory"], columns["config"]["count"]["steps"])

    def claim(self, run_id: str, driver: str) -> None:
        with self._transaction():
            super().claim(run_id, driver)
            self._model.claimed(run_id)

    def begin_attempt(self, run_id: str, *arguments: Any, **named: Any) -> int:
        with self._transaction():
            attempt = super().begin_attempt(run_id, *arguments, **named)
            self._model.begun(run_id, attempt)
        return attempt

    def set_status(self, run_id: str, status: str, *arguments: Any, **named: Any) -> None:
        with self._transaction():
            super().set_status(run_id, status, *arguments, **named)
            self._model.ended(run_id, status)

    def apply(self, message: Message) -> int:
        try:
            acknowledged = super().apply(message)
        except LedgerError:
            self._model.refused(message)
            raise
        self._model.applied(message)
        return acknowledged
