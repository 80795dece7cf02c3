"""Detectors without a level in the study of M-FISHER, each at the setting whose delay is nearest to ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from piste.studies import Lab
from piste.verdicts import Estimate
from piste_workloads.studies._m_fisher_streams import (
    LEVEL,
    ONSET,
    OURS,
    Detectors,
    at_once,
    delay,
    proportion,
    without_shift,
)


class Family(NamedTuple):
    """A detector that is compared at our delay.

    Attributes:
        settings: Its settings, from the quickest to the slowest.
        streams: Which field of the scale says how many streams it is given.
        cheap: Whether false alarms are counted at every setting, for the picture, not just at our delay.
    """

    settings: tuple[dict[str, Any], ...]
    streams: str = "peer_streams"
    cheap: bool = True


def _family(key: str, values: Sequence[float], **fixed: Any) -> Family:
    return Family(tuple({**fixed, key: value} for value in values))


LENGTHS = (1e2, 3e2, 1e3, 3e3, 1e4, 1e5, 1e6, 1e7, 1e8)
OUR_LEVELS = _family("false_alarm_rate", (0.5, LEVEL, 1e-3, 1e-5), kind="shift")
PEERS = {
    "cusum": _family("average_run_length", LENGTHS, kind="cusum"),
    "shiryaev-roberts": _family("average_run_length", LENGTHS, kind="shiryaev_roberts"),
    "adwin": _family("delta", (0.3, 0.05, 2e-3, 1e-4, 2e-5, 1e-6), kind="adwin"),
    "page-hinkley": _family("threshold", (35.0, 50.0, 75.0, 100.0, 130.0, 160.0), kind="page_hinkley"),
    # Its `delta` is half of the shift, as its theory asks for: it is told how large the shift will be.
    "page-hinkley-told": _family(
        "threshold", (10.0, 15.0, 20.0, 30.0, 45.0, 60.0), kind="page_hinkley", delta=math.sqrt(0.5)
    ),
    "kswin": Family(
        (
            {"kind": "kswin", "alpha": 1e-4},
            {"kind": "kswin", "alpha": 1e-4, "window_size": 300, "stat_size": 100},
        ),
        "slowest_streams",
        cheap=False,
    ),
    "online-cp": _family("threshold", (20.0, 200.0, 2000.0), kind="online_cp")._replace(
        streams="slow_streams", cheap=False
    ),
    "crepes": _family(
        "threshold", (1e4, 1e7, 1e10, 1e13), kind="crepes", martingale="sleeper_stayer"
    )._replace(cheap=False),
}


class Point(NamedTuple):
    """A detector with one setting: its mean delay of a late shift, and its share of false alarms."""

    delay: float
    false_alarms: Estimate


class Compared(NamedTuple):
    """A detector at our delay.

    Attributes:
        ours: We, on the same streams.
        nearest: It, at the setting whose delay is nearest to ours.
        others: At its other settings, where these are measured.
    """

    ours: Point
    nearest: Point
    others: list[Point]


def compared(lab: Lab, family: Family) -> Compared:
    """A detector on streams with a late shift of one standard deviation, and on streams without."""
    streams, events = getattr(lab.scale, family.streams), ONSET + 500
    settings: Detectors = {f"setting-{number}": each for number, each in enumerate(family.settings)}
    late = lab.run(
        "stream-late",
        "delay/shift",
        source__streams=streams,
        source__events=events,
        detectors={"shift": OURS} | settings,
        **at_once(events),
    )
    delays = {name: delay(late, name) for name in ("shift", *settings)}
    nearest = min(settings, key=lambda name: abs(delays[name] - delays["shift"]))
    counted = settings if family.cheap else {nearest: settings[nearest]}
    null = without_shift(lab, streams, {"shift": OURS} | counted)
    points = {
        name: Point(delays[name], proportion(null.metrics[f"false_alarm_rate/{name}"], streams))
        for name in ("shift", *counted)
    }
    others = [point for name, point in points.items() if name not in {"shift", nearest}]
    return Compared(points["shift"], points[nearest], others)
