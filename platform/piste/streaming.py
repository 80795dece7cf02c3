"""Ray actors: streams spread over a cluster, a source and a shard of detectors each.

A source's answer goes straight to its shard; the driver says what is read next and waits while a few batches
are on their way. An actor that is killed is restarted by Ray, and the calls that it has not answered are made
again: a source reads the same events, a shard begins with what the ledger has (`shards.py`).
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from piste import catalog
from piste.config import validate
from piste.errors import PisteError
from piste.ledger import Ledger
from piste.ledger.streams import Commit
from piste.ledger.tables import Stream
from piste.shards import Events, Feed, Progress, Shard, StreamRecipe, read, shards_of
from piste.writer import ask, start_writer

WAIT_SECONDS = 0.5  # between two looks at whether the run is to end


class WriterStore:
    """The ledger's part for streams, by way of its writer.

    Args:
        name: The writer's. An actor is not handed the writer itself: what a constructor is given by reference
            may be gone when the actor is restarted.
    """

    def __init__(self, name: str) -> None:
        self._writer = ray.get_actor(name)

    def states(self, run_id: str, numbers: Sequence[int]) -> dict[int, Stream]:
        """See `Streams.states`."""
        found: dict[int, Stream] = ask(self._writer.stream_states.remote(run_id, list(numbers)))
        return found

    def open(self, run_id: str, streams: Sequence[dict[str, Any]]) -> None:
        """See `Streams.open`."""
        ask(self._writer.open_streams.remote(run_id, list(streams)))

    def commit(self, commit: Commit) -> dict[int, int]:
        """See `Streams.commit`."""
        stands: dict[int, int] = ask(self._writer.commit_streams.remote(commit))
        return stands


class SourceActor:
    """The source of a shard's streams."""

    def __init__(self, job: Mapping[str, Any], numbers: Sequence[int]) -> None:
        module, config = _opened(job)
        self._source = module.open_source(config, numbers)

    def read(self, first: int, count: int) -> Mapping[int, Events]:
        """A batch."""
        return read(self._source, first, count)


class ShardActor:
    """A shard of streams."""

    def __init__(self, job: Mapping[str, Any], numbers: Sequence[int]) -> None:
        module, config = _opened(job)
        store = WriterStore(job["writer"])
        self._shard = Shard(module, config, numbers, store, job["run_id"], job["attempt"])

    def open(self) -> Progress:
        """See `Shard.open`."""
        return self._shard.open()

    def take(self, first: int, count: int, batch: Mapping[int, Events]) -> Progress:
        """See `Shard.take`."""
        return self._shard.take(first, count, batch)


def _opened(job: Mapping[str, Any]) -> tuple[Any, StreamRecipe]:
    os.environ["PISTE_HOME"] = job["home"]  # a worker was started elsewhere, and maybe before it was set
    module = catalog.load_workload(job["config"]["workload"])
    config: StreamRecipe = validate(module.Config, job["config"], job["run_id"])
    return module, config


def follow(ledger: Ledger, run_id: str, config: StreamRecipe, stop: threading.Event) -> tuple[int, bool]:
    """Follows the streams of a run on Ray to their end.

    Args:
        ledger: The ledger.
        run_id: The run.
        config: Its recipe.
        stop: Set when it is to end early.

    Returns:
        The attempt's number, and whether it has ended early because it was to.

    Raises:
        BadInput: The resources cannot be had.
        PisteError: A source or a detector failed, or an actor died too often.
    """
    from piste.training import cluster, preflight  # not in the actors' processes, which it would delay

    names = catalog.load_workload(config.workload).stream_names(config)
    with cluster(config.resources):
        preflight(config, ledger.url)
        name = f"{run_id}-{secrets.token_hex(3)}"
        writer = start_writer(ledger.url, f"{name}-writer")
        actors = [writer]
        try:
            job = ask(writer.job.remote(run_id)) | {"name": name, "writer": f"{name}-writer"}
            job["attempt"] = ask(writer.begin_attempt.remote(run_id))
            pairs = []
            for index, numbers in enumerate(shards_of(len(names), config.resources.workers)):
                pairs.append(_start(config, job, index, numbers))
                actors += pairs[-1]
            return job["attempt"], _drive(pairs, config, stop)
        finally:
            for actor in actors:
                ray.kill(actor)


def _start(
    config: StreamRecipe, job: Mapping[str, Any], index: int, numbers: Sequence[int]
) -> tuple[Any, Any]:
    """The named actors of a shard: its source, and its detectors."""
    resources = config.resources
    lives = {
        "max_restarts": resources.max_failures,
        "max_task_retries": -1 if resources.max_failures else 0,
        "scheduling_strategy": "SPREAD",
    }
    source = ray.remote(SourceActor).options(name=f"{job['name']}-source-{index}", num_cpus=0, **lives)
    shard = ray.remote(ShardActor).options(
        name=f"{job['name']}-shard-{index}",
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        **lives,
    )
    return source.remote(job, numbers), shard.remote(job, numbers)


def _drive(pairs: Sequence[tuple[Any, Any]], config: StreamRecipe, stop: threading.Event) -> bool:
    """Feeds all shards to their end; returns whether they have ended early."""
    opened = [_answer(shard.open.remote()) for _, shard in pairs]
    feeds = [Feed(progress, config.stream.batch, config.stream.window) for progress in opened]
    waiting: dict[Any, tuple[int, int]] = {}
    while True:
        if not stop.is_set():
            for index, (feed, (source, shard)) in enumerate(zip(feeds, pairs, strict=True)):
                for first, count in feed.due():
                    batch = source.read.remote(first, count)
                    waiting[shard.take.remote(first, count, batch)] = (index, first)
        if not waiting:
            return not all(feed.ended for feed in feeds)
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=WAIT_SECONDS)
        for reference in done:
            index, first = waiting.pop(reference)
            feeds[index].answered(first, _answer(reference))


def _answer(reference: Any) -> Any:
    """What an actor has answered.

    Raises:
        PisteError: It failed, or died too often.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        failed = error.cause
        raise (
            failed
            if isinstance(failed, PisteError)
            else PisteError(f"{type(failed).__name__}: {failed}".partition("\n")[0])
        ) from error
    except RayActorError as error:
        raise PisteError(
            f"an actor died too often: {str(error).strip().splitlines()[-1]}: "
            "`piste resume` continues from what the ledger has"
        ) from error
    except RayError as error:
        raise PisteError(f"Ray: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
