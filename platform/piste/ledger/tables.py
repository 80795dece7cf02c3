"""The ledger's tables, and what travels to and from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# Metrics of the machine, not of the computation: a repeated run is not expected to repeat them.
WALL_CLOCK = ("time/", "system/")
ACTIVE = ("planned", "running")
STREAM = "stream"  # the kind, in its provenance, of a run that is streams

_Id = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    """All tables."""

    type_annotation_map = {dict[str, Any]: JSON}  # noqa: RUF012 (SQLAlchemy's own protocol)


class Meta(Base):
    """Facts about the database itself: its schema version."""

    __tablename__ = "meta"
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class Sweep(Base):
    """A search over the runs of one recipe, over all its sessions.

    Attributes:
        config: The resolved recipe with its `[sweep]`.
        provenance: What its runs share; a run's own completes it.
        trials: How many trials it is to have; None where the searcher decides.
        seconds: How long its sessions have taken together.
    """

    __tablename__ = "sweeps"
    id: Mapped[str] = mapped_column(primary_key=True)
    recipe: Mapped[str]
    workload: Mapped[str]
    config: Mapped[dict[str, Any]]
    provenance: Mapped[dict[str, Any]]
    directory: Mapped[str]
    status: Mapped[str] = mapped_column(index=True)
    driver: Mapped[str | None]
    created: Mapped[float]
    finished: Mapped[float | None]
    error: Mapped[str | None]
    trials: Mapped[int | None]
    seconds: Mapped[float] = mapped_column(default=0.0)


class Run(Base):
    """One run of a recipe, over all its attempts.

    Attributes:
        sweep_id: The sweep that made it; its provenance completes this run's.
        started: When the newest attempt began.
        seconds: How long its attempts have computed together.
    """

    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(primary_key=True)
    recipe: Mapped[str]
    workload: Mapped[str]
    seed: Mapped[int]
    config: Mapped[dict[str, Any]]
    provenance: Mapped[dict[str, Any]]
    identity: Mapped[str] = mapped_column(index=True)
    cell: Mapped[str]
    directory: Mapped[str]
    status: Mapped[str]
    attempt: Mapped[int] = mapped_column(default=0)
    driver: Mapped[str | None]
    created: Mapped[float]
    finished: Mapped[float | None]
    error: Mapped[str | None]
    recomputed_different: Mapped[int] = mapped_column(default=0)
    sweep_id: Mapped[str | None] = mapped_column(ForeignKey("sweeps.id"), index=True)
    started: Mapped[float | None]
    seconds: Mapped[float] = mapped_column(default=0.0, server_default="0")

    @property
    def is_stream(self) -> bool:
        """Whether it is followed as streams, not trained."""
        return self.provenance.get("kind") == STREAM


class Trial(Base):
    """One trial of a sweep: the values that the searcher chose, the run that has them, what came of it.

    Attributes:
        cell: Its number among the sweep's points; trials of one cell differ in the seed alone.
        values: The chosen values by dotted key, without the seed.
        memory: What the searcher wants to find again, where it wants anything.
        run_id: Its run; that of another sweep where `reused`.
        outcome: `finished`, `pruned` or `failed`; None while it is open.
        value: The objective. NULL where it is not finite; `special` then says which.
        step: The last step that the objective is of, for a pruned trial.
    """

    __tablename__ = "trials"
    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    cell: Mapped[int]
    values: Mapped[dict[str, Any]]
    memory: Mapped[dict[str, Any] | None]
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), index=True)
    reused: Mapped[bool] = mapped_column(default=False)
    outcome: Mapped[str | None]
    value: Mapped[float | None]
    special: Mapped[str | None]
    step: Mapped[int | None] = mapped_column(BigInteger)


class Job(Base):
    """A command that was sent to a Ray cluster; Ray forgets it with its head, the ledger does not.

    Attributes:
        id: Ray's submission id too.
        request: What was asked for: verb, arguments, entrypoint, environment, resources, packages.
        content: sha256 of the request and of the code that is sent: the same id with another is refused.
        address: The cluster's dashboard.
        session: Which life of the cluster's head took the job.
        status: `planned`, `sent`, `running`, then `succeeded`, `failed`, `stopped` or `lost`.
        subject: The run, sweep or study that its driver has made.
    """

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(primary_key=True)
    request: Mapped[dict[str, Any]]
    content: Mapped[str]
    address: Mapped[str]
    session: Mapped[str | None]
    status: Mapped[str] = mapped_column(index=True)
    subject: Mapped[str | None]
    created: Mapped[float]
    finished: Mapped[float | None]
    error: Mapped[str | None]


class Metric(Base):
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


class Artifact(Base):
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


class Stream(Base):
    """One stream of a run: how far its detectors have accounted for it, and what continues them bit for bit.

    Attributes:
        number: Its number among the run's streams.
        sequence: Events accounted for; the number of the next one.
        ended: Whether its source has no more.
        skipped: Events that were not finite.
        alarms: Alarms raised.
        wealth: Each detector's log-wealth, coded as the states are.
        origin: What never changes of its processor's state: settings and calibration.
        state: What every event changes.
    """

    __tablename__ = "streams"
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    sequence: Mapped[int] = mapped_column(BigInteger)
    ended: Mapped[bool]
    skipped: Mapped[int] = mapped_column(BigInteger)
    alarms: Mapped[int] = mapped_column(BigInteger)
    wealth: Mapped[dict[str, Any]]
    origin: Mapped[dict[str, Any]]
    state: Mapped[dict[str, Any]]


class StreamAlarm(Base):
    """An alarm that a detector has raised on a stream.

    Attributes:
        number: The stream's number.
        detector: The detector's name in the recipe.
        sequence: The event that raised it.
        onset: The estimated number of the first shifted event.
        log_wealth: The logarithm of the detector's statistic.
        log_threshold: What it had to reach.
        details: The winning bet, the segment, and the detector's parameters, coded as the states are.
        timestamp: When it was raised, in milliseconds since the epoch.
    """

    __tablename__ = "stream_alarms"
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    detector: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    onset: Mapped[int] = mapped_column(BigInteger)
    log_wealth: Mapped[float]
    log_threshold: Mapped[float]
    details: Mapped[dict[str, Any]]
    timestamp: Mapped[int] = mapped_column(BigInteger)


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


class TrialRecord(NamedTuple):
    """A trial as it is read: the columns of `Trial` with those of its run that a reader needs."""

    number: int
    cell: int
    seed: int
    values: dict[str, Any]
    memory: dict[str, Any] | None
    run_id: str
    reused: bool
    outcome: str | None
    value: float | None
    step: int | None
    status: str
    error: str | None
    created: float
    finished: float | None
    seconds: float


def number(metric: Metric | StoredRow) -> float:
    """A metric's value, `nan` and `inf` included."""
    return float(metric.special or "nan") if metric.value is None else metric.value


def stored(value: float) -> tuple[float | None, str | None]:
    """How a value is stored: SQLite would turn NaN into NULL, so that non-finite ones go by name."""
    return (value, None) if math.isfinite(value) else (None, str(value))


def metric_columns(run_id: str, row: Row) -> dict[str, Any]:
    """A metric's columns."""
    value, special = stored(row.value)
    return {
        "run_id": run_id,
        "key": row.key,
        "step": row.step,
        "value": value,
        "special": special,
        "timestamp": row.timestamp,
    }
