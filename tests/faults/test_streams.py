"""Killed actors and a killed host of a run of streams: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.faults.hosts import Hosts
from tests.platform.driving import end, ledger_of, start_piste, wait_until
from tests.workloads.killed_streams import follow_with_kills
from tests.workloads.offline_streams import assert_offline

from piste.config import Resources, Tracking
from piste.shards import Pace
from piste_workloads.stream import Config
from piste_workloads.stream.config import DetectorSection, Source

pytest_plugins = ["tests.platform.fixtures"]

KILLS, EVERY = 10, 3_000


@pytest.mark.fault
def test_ten_kills_lose_nothing_and_count_nothing_twice(local_ray: None, no_view: None) -> None:
    source = Source(name="lognormal", streams=4, events=(KILLS + 1) * EVERY, calibration=600)
    config = Config(
        seed=11,
        source=source.model_copy(update={"shift": 0.5, "onset": 20_000}),
        detectors={"shift": DetectorSection(), "conformal": DetectorSection(kind="conformal")},
        stream=Pace(batch=100),
        resources=Resources(workers=2, max_failures=KILLS),
        tracking=Tracking(system_metrics=False),
    )
    kinds = ["shard", "shard", "source"] * KILLS
    kills = [(kinds[n], (n + 1) * EVERY) for n in range(KILLS)]
    seconds = follow_with_kills(config, kills)
    assert len(seconds) == KILLS


RECIPE = """
workload = "stream"
seed = 13
source = { name = "gamma", streams = 4, events = 200_000, calibration = 600, shift = 0.5, onset = 150_000 }
stream = { batch = 100 }
detectors = { shift = {}, cusum = { kind = "cusum" } }
tracking = { system_metrics = false }
"""


@pytest.mark.fault
def test_streams_move_from_a_killed_host(shown_home: Path, tmp_path: Path, hosts: Hosts) -> None:
    recipe = tmp_path / "streams.toml"
    recipe.write_text(RECIPE)
    hosts.add()  # two are taken, the third is there to move to
    where = ["--resources.address", hosts.address, "--resources.one_host", "true", "--resources.workers", "2"]
    process = start_piste(shown_home, "stream", str(recipe), "--name", "moved", *where, "--json")

    def standing() -> dict[int, int]:
        """How far each stream is."""
        assert process.poll() is None, end(process)
        ledger = ledger_of(shown_home)
        found = ledger.streams.standing("moved") if ledger.has("moved") else []
        return {stream["number"]: int(stream["sequence"]) for stream in found}

    wait_until(lambda: min(standing().values(), default=0) >= 5_000, "5,000 events of each stream", 120.0)
    struck = hosts.running("ShardActor")[0]
    hosts.kill(struck)
    killed, at = time.monotonic(), standing()
    assert max(at.values()) < 190_000
    wait_until(
        lambda: all(standing()[number] >= sequence + 200 for number, sequence in at.items()),
        "that the killed host's streams go on",
        60.0,
    )
    seconds = time.monotonic() - killed
    code, _, err = end(process)
    assert code == 0, err
    ledger = ledger_of(shown_home)
    assert ledger.run("moved").attempt == 1
    assert_offline(ledger, "moved", Config.model_validate(ledger.run("moved").config))
    assert seconds < 20.0  # a silent host is held for dead after 12
