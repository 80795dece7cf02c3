"""Streams: how far each is accounted for, its detectors' states, and their alarms, in one transaction.

A commit says from which event to which it takes a stream. The ledger applies it where the stream stands at
the first of them, and ignores it where the stream stands at the last of them or beyond: a commit may come
twice, or late from an actor that was given up, and no event is accounted for twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, func, select, update

from piste.ledger.database import Database
from piste.ledger.faults import LedgerError, repeats_lost_calls
from piste.ledger.runs import insert_rows
from piste.ledger.tables import Row, Run, Stream, StreamAlarm

_NUMBER = "$number"  # JSON has no infinities: a number that is not finite goes by name
_CHANGING = ("sequence", "ended", "skipped", "alarms", "wealth", "state")


@dataclass(frozen=True)
class Advance:
    """One stream's part of a commit: the columns of `Stream` that change.

    Attributes:
        before: The sequence number that it was computed from.
    """

    number: int
    before: int
    sequence: int
    ended: bool
    skipped: int
    alarms: int
    wealth: dict[str, Any]
    state: dict[str, Any]


@dataclass(frozen=True)
class Commit:
    """What a shard has computed of a batch.

    Attributes:
        run_id: The run.
        attempt: The attempt that the shard belongs to; earlier ones are fenced off.
        advances: Its streams that have new events.
        alarms: Columns of `StreamAlarm` but for the run and the time.
        rows: Metrics.
    """

    run_id: str
    attempt: int
    advances: tuple[Advance, ...]
    alarms: tuple[dict[str, Any], ...] = ()
    rows: tuple[Row, ...] = ()


@repeats_lost_calls
class Streams:
    """Reads and writes streams.

    Args:
        database: The ledger's database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def open(self, run_id: str, streams: Sequence[dict[str, Any]]) -> None:
        """Records streams that no event has been taken of; those that are there already stay as they are.

        Args:
            run_id: The run.
            streams: `number`, `name`, `wealth`, `origin` and `state` of each.
        """
        fresh = {"run_id": run_id, "sequence": 0, "ended": False, "skipped": 0, "alarms": 0}
        rows = [fresh | _coded(stream) for stream in streams]
        statement = self._database.insert(Stream)
        with self._database.writing() as connection:
            if rows:
                keys = ["run_id", "number"]
                connection.execute(statement.on_conflict_do_nothing(index_elements=keys), rows)

    def commit(self, commit: Commit) -> dict[int, int]:
        """Applies what a shard has computed; returns where each of its streams stands now.

        Raises:
            LedgerError: It belongs to an earlier attempt, or begins where no stream stands; nothing of it was
                recorded.
        """
        with self._database.writing() as connection:
            mine = select(Run.attempt).where(Run.id == commit.run_id)
            current = connection.execute(mine.with_for_update(key_share=True)).scalar_one_or_none()
            if current is None or commit.attempt < current:
                raise LedgerError(f"{commit.run_id}: attempt {commit.attempt} is over: another one goes on")
            numbers = [advance.number for advance in commit.advances]
            query = select(Stream.number, Stream.sequence).where(
                Stream.run_id == commit.run_id, Stream.number.in_(numbers)
            )
            stands: dict[int, int] = {row.number: row.sequence for row in connection.execute(query)}
            applied = [a for a in commit.advances if stands.get(a.number) == a.before]
            for advance in commit.advances:
                if stands.get(advance.number, -1) < advance.before:
                    raise LedgerError(
                        f"{commit.run_id}: stream {advance.number} stands at {stands.get(advance.number)}, "
                        f"events from {advance.before} on cannot be next"
                    )
            if applied:
                place = (Stream.run_id == bindparam("of_run"), Stream.number == bindparam("of_stream"))
                statement = update(Stream).where(*place).values({c: bindparam(c) for c in _CHANGING})
                rows = [
                    {"of_run": commit.run_id, "of_stream": a.number}
                    | {c: v for c, v in _coded(vars(a)).items() if c in _CHANGING}
                    for a in applied
                ]
                connection.execute(statement, rows)
            if commit.alarms:
                raised = {"run_id": commit.run_id, "timestamp": time.time_ns() // 1_000_000}
                absent = self._database.insert(StreamAlarm).on_conflict_do_nothing(
                    index_elements=["run_id", "number", "detector", "sequence"]
                )
                connection.execute(absent, [raised | _coded(alarm) for alarm in commit.alarms])
            insert_rows(connection, commit.run_id, commit.rows)
        return stands | {a.number: a.sequence for a in applied}

    def states(self, run_id: str, numbers: Sequence[int]) -> dict[int, Stream]:
        """Streams by number, with their states; those that were never opened are left out."""
        query = select(Stream).where(Stream.run_id == run_id, Stream.number.in_(numbers))
        with self._database.session() as session:
            found = list(session.scalars(query))
        for stream in found:
            stream.wealth, stream.origin, stream.state = map(
                decoded, (stream.wealth, stream.origin, stream.state)
            )
        return {stream.number: stream for stream in found}

    def standing(self, run_id: str, states: bool = False) -> list[dict[str, Any]]:
        """Where a run's streams stand, by number; with `states` also their states."""
        names = ["number", "name", "sequence", "ended", "skipped", "alarms", "wealth"]
        coded_ones = ["wealth", *(["state"] if states else [])]
        names += coded_ones[1:]
        columns = [getattr(Stream, name) for name in names]
        query = select(*columns).where(Stream.run_id == run_id).order_by(Stream.number)
        with self._database.reading() as connection:
            rows = [dict(row._mapping) for row in connection.execute(query)]
        return [row | {name: decoded(row[name]) for name in coded_ones} for row in rows]

    def totals(self, run_id: str) -> dict[str, int]:
        """How many streams a run has, how many have ended, and events, skipped ones and alarms of all."""
        query = select(
            func.count(),
            func.coalesce(func.sum(Stream.sequence), 0),
            func.coalesce(func.sum(Stream.skipped), 0),
            func.coalesce(func.sum(Stream.alarms), 0),
        ).where(Stream.run_id == run_id)
        with self._database.reading() as connection:
            streams, events, skipped, alarms = connection.execute(query).one()
            mine = (Stream.run_id == run_id, Stream.ended)
            ended = connection.execute(select(func.count()).where(*mine)).scalar_one()
        counts = {"streams": streams, "ended": ended, "events": events, "skipped": skipped, "alarms": alarms}
        return {name: int(count) for name, count in counts.items()}

    def alarms(self, run_id: str, limit: int | None = None, among: range | None = None) -> list[StreamAlarm]:
        """A run's alarms, by stream, detector and event.

        Args:
            run_id: The run.
            limit: The newest alone, newest first.
            among: Those that events of these numbers have raised.
        """
        query = select(StreamAlarm).where(StreamAlarm.run_id == run_id)
        if among is not None:
            query = query.where(StreamAlarm.sequence >= among.start, StreamAlarm.sequence < among.stop)
        place = (StreamAlarm.number, StreamAlarm.detector)
        if limit is None:
            query = query.order_by(*place, StreamAlarm.sequence)
        else:  # all of a commit have its time
            newest = (StreamAlarm.timestamp.desc(), StreamAlarm.sequence.desc())
            query = query.order_by(*newest, *place).limit(limit)
        with self._database.session() as session:
            return list(session.scalars(query))


def _coded(columns: dict[str, Any]) -> dict[str, Any]:
    return {key: coded(value) if isinstance(value, dict) else value for key, value in columns.items()}


def coded(value: Any) -> Any:
    """A state as strict JSON takes it, exactly: `{"$number": "-inf"}` for a number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else {_NUMBER: str(value)}
    if isinstance(value, dict):
        return {key: coded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [coded(each) for each in value]
    return value


def decoded(value: Any) -> Any:
    """What `coded` was given, with lists for tuples."""
    if isinstance(value, dict):
        if value.keys() == {_NUMBER}:
            return float(value[_NUMBER])
        return {key: decoded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [decoded(each) for each in value]
    return value
