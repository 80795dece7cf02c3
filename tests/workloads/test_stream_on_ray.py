"""Streams on actors that are killed: the log-wealth of each is the one computed offline, to the last bit."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

from tests.platform.driving import wait_until
from tests.workloads.offline_streams import assert_offline

from piste import running, streams
from piste.config import Resources, Tracking
from piste.ledger import open_ledger
from piste.shards import Pace
from piste_workloads.stream import Config
from piste_workloads.stream.config import DetectorSection, Source

pytest_plugins = ["tests.platform.fixtures"]

EVENTS = 30_000


def pid_of(kind: str, number: int) -> int:
    """The process of the `number`-th actor of a kind."""
    import ray

    found = [a for a in ray._private.state.actors().values() if a["State"] == "ALIVE"]
    [actor] = [a for a in found if a["Name"].endswith(f"-{kind}-{number}")]
    return int(actor["Pid"])


def test_killed_actors_lose_nothing_and_count_nothing_twice(local_ray: None, no_view: None) -> None:
    config = Config(
        seed=3,
        source=Source(name="gamma", streams=4, events=EVENTS, calibration=600, shift=0.5, onset=20_000),
        detectors={"shift": DetectorSection(), "cusum": DetectorSection(kind="cusum")},
        stream=Pace(batch=100),
        resources=Resources(workers=2),
        tracking=Tracking(system_metrics=False),
    )
    ledger = open_ledger()
    run_id = streams.plan(ledger, "killed", config)

    def reached() -> int:
        """How far the streams of the first shard are."""
        standing = ledger.streams.standing(run_id)
        return int(standing[0]["sequence"]) if standing else 0

    def kill(kind: str, after: int) -> None:
        wait_until(lambda: reached() >= after, f"{after} events")
        os.kill(pid_of(kind, 0), signal.SIGKILL)

    def kill_some() -> int:
        kill("shard", 3_000)
        kill("source", 10_000)
        kill("shard", 17_000)
        return reached()

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill_some)
        result = running.execute(ledger, run_id, local=False)
        assert killer.result() < EVENTS  # there was something left to do
    assert result.status == "finished"
    assert ledger.run(run_id).attempt == 1
    assert_offline(ledger, run_id, config)
