"""The learning rate over a run, as a factor of each group's own learning rate."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from piste.config import Section


class Schedule(Section):
    """What a workload's `[train]` says of the learning rate."""

    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="wsd", description="of the learning rate; wsd: warm-up, stable, decay"
    )
    warmup_steps: int = Field(default=20, ge=0, description="linear warm-up")
    decay_fraction: float = Field(default=0.4, gt=0.0, le=1.0, description="wsd: the steps that decay")
    minimum_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0, description="last lr / highest lr")


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The factor of one step; a function of the step alone, so that a resumed run needs no state for it.

    With `t = step - 1`, `w` warm-up steps, the last step at `T = steps - 1`, and `m` the minimum ratio:

        warm-up (t < w)    (t + 1) / w
        constant           1
        cosine             m + (1 - m) (1 + cos(pi p)) / 2,   p = (t - w) / (T - w)
        wsd                1, and over the last `decay_fraction` of the steps 1 - (1 - m) p,
                           p = (t - s) / (T - s), with s where the decay starts

    The decay of `wsd` is linear (Hägele et al., arXiv:2405.18392). Both reach `m` at the last step.

    Args:
        schedule: The recipe's `[train]`.
        step: The step, counted from 1.
        steps: How many there are.

    Returns:
        The factor, from 0 to 1.
    """
    t, last = step - 1, steps - 1
    if t < schedule.warmup_steps:
        return (t + 1) / schedule.warmup_steps
    if schedule.schedule == "constant":
        return 1.0
    if schedule.schedule == "wsd":
        start = max(schedule.warmup_steps, last - round(schedule.decay_fraction * steps))
        progress = max(0.0, (t - start) / max(1, last - start))
        return 1.0 - (1.0 - schedule.minimum_lr_ratio) * progress
    progress = (t - schedule.warmup_steps) / max(1, last - schedule.warmup_steps)
    return (
        schedule.minimum_lr_ratio
        + (1.0 - schedule.minimum_lr_ratio) * (1.0 + math.cos(math.pi * progress)) / 2
    )
