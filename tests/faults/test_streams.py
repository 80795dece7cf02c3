"""Many kills of the actors of one run of streams: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import pytest
from tests.workloads.killed_streams import follow_with_kills

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
