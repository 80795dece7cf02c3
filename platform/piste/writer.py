"""The ledger's writer as a Ray actor, and how processes on the cluster speak with it.

It is the first thing that they all wait for, so its process imports little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from piste.buffer import Send
from piste.errors import PisteError
from piste.home import home
from piste.ledger import Ledger, Message
from piste.ledger.streams import Commit
from piste.stopping import ASKED, LOST, PREEMPTED

WRITER_SECONDS = 75.0  # longer than the ledger waits for its database
DRAIN_SECONDS = 1.0


class Writer:
    """The only writer of a driver's runs, as an actor; every call may be repeated.

    What it keeps in memory is lost when its process is killed: the driver says it again, or starts again the
    work that it was about.
    """

    def __init__(self, url: str) -> None:
        self._ledger = Ledger(url, patient=True)
        self._failures: dict[str, str] = {}
        self._packs: dict[str, Any] = {}
        self._over: dict[str, int] = {}  # of each run, the last attempt that nobody waits for any more
        self._stopping = False
        self._draining: set[str] = set()
        self._looked = float("-inf")

    def apply(self, message: Message) -> int:
        """Commits metrics; returns the acknowledgement."""
        return self._ledger.apply(message)

    def job(self, run_id: str) -> dict[str, Any]:
        """What a worker is told of a run that it is to compute; earlier failures and attempts are over."""
        self._failures.pop(run_id, None)
        row = self._ledger.run(run_id)
        self._over[run_id] = row.attempt
        return {
            "run_id": row.id,
            "attempt": row.attempt,
            "config": row.config,
            "directory": row.directory,
            "created": row.created,
            "home": str(home()),
        }

    def begin_attempt(self, run_id: str) -> int:
        """Begins the next attempt of a run; returns its number."""
        return self._ledger.begin_attempt(run_id)

    def failure(self, run_id: str) -> str | None:
        """Why a run failed on its own account, if it did."""
        return self._failures.get(run_id)

    def fail(self, run_id: str, message: str) -> None:
        """Records that a run failed on its own account."""
        self._failures[run_id] = message
        self._ledger.set_status(run_id, "failed", message)

    def finish(self, run_id: str) -> None:
        """Records that a run has ended well."""
        self._ledger.set_status(run_id, "finished")

    def interrupt(self, run_id: str, why: str) -> None:
        """Records that a run has ended early, with a checkpoint."""
        self._ledger.set_status(run_id, "interrupted", why)

    def stop(self) -> None:
        """Asks all of the driver's runs to end early."""
        self._stopping = True

    def told(self, run_id: str, attempt: int, nodes: Collection[str]) -> str | None:
        """Why an attempt of a run, with its workers on these nodes, is to end early; None: it may go on."""
        if self._stopping:
            return ASKED
        if attempt <= self._over.get(run_id, 0):
            return LOST
        if time.monotonic() > self._looked + DRAIN_SECONDS:
            self._draining = set(ray._private.state.state.get_draining_nodes())
            self._looked = time.monotonic()
        return None if self._draining.isdisjoint(nodes) else PREEMPTED

    def stream_states(self, run_id: str, numbers: Sequence[int]) -> Any:
        """Where a run's streams stand, with their states."""
        return self._ledger.streams.states(run_id, numbers)

    def open_streams(self, run_id: str, streams: Sequence[dict[str, Any]]) -> None:
        """Records streams that begin."""
        self._ledger.streams.open(run_id, streams)

    def commit_streams(self, commit: Commit) -> dict[int, int]:
        """Commits what a shard has computed; returns where its streams stand."""
        return self._ledger.streams.commit(commit)

    def keep(self, name: str, work: Any) -> None:
        """Keeps a pack until it is fetched."""
        self._packs[name] = work

    def pack(self, name: str) -> Any:
        """A pack that is to be computed; None where one trial is."""
        return self._packs.get(name)

    def record(self, name: str, rows: Any) -> None:
        """Records a computed pack, once, and forgets what it was made of."""
        self._packs.pop(name, None)
        if not self._ledger.has(name):
            self._ledger.sweeps.record(*rows)


def start_writer(url: str, name: str | None = None) -> Any:
    """The writer of a ledger, on this driver's node.

    Args:
        url: The ledger.
        name: Under which actors find it; none where all are handed it.
    """
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(Writer)
        .options(
            name=name,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote(url)
    )


def transport(writer: Any) -> Send:
    """Delivers messages to the writer's actor, however often it is restarted."""

    def send(message: Message) -> int:
        return int(ask(writer.apply.remote(message)))

    return send


def listener(writer: Any, run_id: str, attempt: int, nodes: Collection[str]) -> Callable[[], str | None]:
    """Asks the writer why an attempt of a run, with its workers on these nodes, is to end early."""

    def told() -> str | None:
        why: str | None = ask(writer.told.remote(run_id, attempt, nodes))
        return why

    return told


def ask(reference: Any) -> Any:
    """The writer's answer.

    Raises:
        PisteError: It refuses, or does not answer in time.
    """
    try:
        return ray.get(reference, timeout=WRITER_SECONDS)
    except RayTaskError as error:
        raise PisteError(str(error.cause)) from error
    except (RayError, GetTimeoutError) as error:
        raise PisteError(f"the ledger's writer does not answer: {error}") from error
