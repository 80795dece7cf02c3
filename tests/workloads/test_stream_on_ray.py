"""Streams on actors that are killed: the log-wealth of each is the one computed offline, to the last bit."""

from __future__ import annotations

import pytest
from tests.workloads.killed_streams import follow_with_kills

from piste.config import Resources, Tracking
from piste.shards import Pace
from piste_workloads.stream import Config
from piste_workloads.stream.config import DetectorSection, Source

pytest_plugins = ["tests.platform.fixtures"]


@pytest.mark.slow
def test_killed_actors_lose_nothing_and_count_nothing_twice(local_ray: None, no_view: None) -> None:
    config = Config(
        seed=3,
        source=Source(name="gamma", streams=4, events=20_000, calibration=600, shift=0.5, onset=15_000),
        detectors={"shift": DetectorSection(), "cusum": DetectorSection(kind="cusum")},
        stream=Pace(batch=100),
        resources=Resources(workers=2),
        tracking=Tracking(system_metrics=False),
    )
    follow_with_kills(config, [("shard", 3_000), ("source", 10_000)])
