"""What came of the streams: false alarms, shifts found, and delays against what is to be expected."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from piste_algorithms.martingales import expected_delay
from piste_workloads.stream import tally
from piste_workloads.stream.config import Config
from piste_workloads.stream.recorded import RECORDED
from piste_workloads.stream.simulated import samples

SAMPLES = 100_000
INDEPENDENT = ("gamma", "gaussian", "lognormal")


def summarize(
    config: Config, streams: Sequence[Mapping[str, Any]], alarms: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """The metrics of a whole run.

    Args:
        config: The recipe.
        streams: `number`, `name`, `sequence` and `state` of each stream, among others.
        alarms: `number`, `detector`, `sequence` and `onset` of each alarm, among others, in their order.

    Returns:
        Of recorded streams and metrics `alarmed/NAME` of each detector, the part with an alarm. Of all others
        `false_alarm_rate/NAME` of each detector, the part of the streams with an alarm before the
        shift, and where there is a shift, of the other streams, `detected/NAME`, the part with an alarm after
        it, and of their first such alarms `delay/NAME`, the mean number of shifted events until then,
        `delay_ratio/NAME`, that over log(2 / false_alarm_rate) / information gain, and `onset_error/NAME`,
        the median distance of the estimated onset from the true one. Of images, of each stream,
        `accuracy_before/NAME`, `accuracy_during/NAME` and `accuracy_after/NAME`, `ece_before/NAME` and so on,
        the expected calibration error, `change/NAME`, the largest difference of a probability from the
        unadapted classifier's, `updates_before/NAME`, the steps of adaptation before the corruption, and of
        adapters with a condition `prompt_difference/NAME` and `prediction_difference/NAME` (see `Twin`).
    """
    images = config.source.name == "images"
    onset = config.source.onset if images or config.source.shift != 0.0 else math.inf
    found = dict[str, float]()
    for stream in streams if images else ():
        found |= tally.metrics(stream["name"], stream["state"])
    for name, section in config.detectors.items():
        if config.source.name in (*RECORDED, "metric"):
            found[f"alarmed/{name}"] = len({a["number"] for a in alarms if a["detector"] == name}) / len(
                streams
            )
            continue
        mine = [alarm for alarm in alarms if alarm["detector"] == name]
        false = {alarm["number"] for alarm in mine if alarm["sequence"] < onset}
        found[f"false_alarm_rate/{name}"] = len(false) / len(streams)
        first: dict[int, Mapping[str, Any]] = {}
        for alarm in mine:
            if alarm["sequence"] >= onset and alarm["number"] not in false:
                first.setdefault(alarm["number"], alarm)
        reached = [s for s in streams if s["number"] not in false and s["sequence"] > onset]
        if not reached:
            continue
        found[f"detected/{name}"] = len(first) / len(reached)
        if not first:
            continue
        delay = statistics.fmean(alarm["sequence"] - onset + 1 for alarm in first.values())
        found[f"delay/{name}"] = delay
        found[f"onset_error/{name}"] = statistics.median(abs(a["onset"] - onset) for a in first.values())
        if config.source.name in INDEPENDENT and hasattr(built := section.build(), "false_alarm_rate"):
            _, expected = expected_delay(*samples(config, SAMPLES), built.false_alarm_rate)
            found[f"delay_ratio/{name}"] = delay / expected
    return found
