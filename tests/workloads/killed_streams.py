"""Streams on a local Ray whose actors are killed while they are followed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ray
from tests.platform.driving import wait_until
from tests.workloads.offline_streams import assert_offline

from piste import running, streams
from piste.ledger import open_ledger
from piste_workloads.stream import Config


def pid_of(kind: str, number: int) -> int:
    """The process of the `number`-th actor of a kind (`source` or `shard`)."""
    found = [a for a in ray._private.state.actors().values() if a["State"] == "ALIVE"]
    [actor] = [a for a in found if a["Name"].endswith(f"-{kind}-{number}")]
    return int(actor["Pid"])


def follow_with_kills(config: Config, kills: Sequence[tuple[str, int]]) -> list[float]:
    """Follows streams on two shards, of whose first actors are killed, and holds them to the offline ones.

    Args:
        config: The recipe.
        kills: `(kind, events)`: the actor that is killed once the first shard is so far.

    Returns:
        The seconds from each kill to the first commit that the killed actor had no part in.
    """
    ledger = open_ledger()
    run_id = streams.plan(ledger, "killed", config)

    def reached() -> int:
        """How far the streams of the first shard are."""
        standing = ledger.streams.standing(run_id)
        return int(standing[0]["sequence"]) if standing else 0

    def kill(kind: str, after: int) -> float:
        wait_until(lambda: reached() >= after, f"{after} events")
        os.kill(pid_of(kind, 0), signal.SIGKILL)
        killed, at = time.monotonic(), reached()
        # One commit may be on its way from the shard; what a source has read before, a window of batches.
        ahead = (2 if kind == "shard" else config.stream.window + 1) * config.stream.batch
        wait_until(lambda: reached() >= min(at + ahead, config.events), "that it goes on")
        return time.monotonic() - killed

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(lambda: [kill(*each) for each in kills])
        result = running.execute(ledger, run_id, local=False)
        seconds = killer.result()
    assert result.status == "finished"
    assert ledger.run(run_id).attempt == 1
    assert_offline(ledger, run_id, config)
    return seconds
