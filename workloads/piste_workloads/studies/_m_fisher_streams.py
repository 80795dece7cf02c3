"""Streams of the study of M-FISHER: without a shift, with one at the start, with a late one."""

from __future__ import annotations

import math
from typing import Any

from scipy import stats

from piste.running import RunResult
from piste.studies import Lab
from piste.verdicts import Estimate

LEVEL, ONSET = 0.05, 1000
LAWS, SIZES = ("gamma", "gaussian", "lognormal"), (500, 2000)
SHIFTS = (0.5, 1.0)  # standard deviations
RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

Detectors = dict[str, dict[str, Any]]

OURS: dict[str, Any] = {"kind": "shift", "false_alarm_rate": LEVEL}
KINDS: Detectors = {
    "shift": OURS,
    "plain": OURS | {"onset": "plain"},
    "bootstrap": OURS | {"bound": "bootstrap"},
    "plugin-plain": OURS | {"bound": "plugin", "onset": "plain"},
}
AT_RATES: Detectors = {f"rate-{rate:g}": OURS | {"false_alarm_rate": rate} for rate in RATES}


def without_shift(lab: Lab, streams: int, detectors: Detectors, **source: Any) -> RunResult:
    """A run of streams that do not shift."""
    settings = {f"source__{key}": value for key, value in source.items()}
    return lab.run(
        "stream-null",
        f"false_alarm_rate/{next(iter(detectors))}",
        source__streams=streams,
        source__events=lab.scale.events,
        detectors=detectors,
        **at_once(lab.scale.events),
        **settings,
    )


def at_once(events: int) -> dict[str, int]:
    """One batch a stream, in one process: what comes of streams does not depend on it."""
    return {"stream__batch": events, "resources__workers": 1}


def proportion(share: float, streams: int) -> Estimate:
    """A share of streams with Clopper and Pearson's interval."""
    low, high = stats.binomtest(round(share * streams), streams).proportion_ci()
    return Estimate(share, float(low), float(high))


def shifted_at_once(lab: Lab, shift: float) -> list[RunResult]:
    """Runs of streams that shift with their first event, one a seed."""
    settings = {"source__shift": shift, "source__streams": lab.scale.delays, **at_once(1500)}
    return lab.runs(
        "stream-delay",
        "delay/shift",
        lab.scale.seeds,
        source__events=1500,
        detectors=KINDS | AT_RATES,
        **settings,
    )


def shifted_late(lab: Lab, shift: float) -> list[RunResult]:
    """Runs of streams that shift after a thousand events, one a seed."""
    settings = {"source__shift": shift, "source__streams": lab.scale.delays, **at_once(5000)}
    return lab.runs(
        "stream-late", "delay/shift", lab.scale.seeds, source__events=5000, detectors=KINDS, **settings
    )


def delay(run: RunResult, name: str, metric: str = "delay") -> float:
    """A detector's mean delay; infinite where it missed a shift."""
    return run.metrics[f"{metric}/{name}"] if run.metrics.get(f"detected/{name}") == 1.0 else math.inf
