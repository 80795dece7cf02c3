"""The learning rate over a run, as a factor of each group's own learning rate."""

from __future__ import annotations

import math

from piste_workloads.llm.config import Train


def lr_factor(train: Train, step: int) -> float:
    """The factor of one step; a function of the step alone, so that a resumed run needs no state for it.

    With `t = step - 1`, `w` warm-up steps, the last step at `T = steps - 1`, and `m` the minimum ratio:

        warm-up (t < w)    (t + 1) / w
        constant           1
        cosine             m + (1 - m) (1 + cos(pi p)) / 2,   p = (t - w) / (T - w)
        wsd                1, and over the last `decay_fraction` of the steps 1 - (1 - m) p,
                           p = (t - s) / (T - s), with s where the decay starts

    The decay of `wsd` is linear (Hägele et al., arXiv:2405.18392). Both reach `m` at the last step.

    Args:
        train: The recipe's `[train]`.
        step: The step, counted from 1.

    Returns:
        The factor, from 0 to 1.
    """
    t, last = step - 1, train.steps - 1
    if t < train.warmup_steps:
        return (t + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    if train.schedule == "wsd":
        start = max(train.warmup_steps, last - round(train.decay_fraction * train.steps))
        progress = max(0.0, (t - start) / max(1, last - start))
        return 1.0 - (1.0 - train.minimum_lr_ratio) * progress
    progress = (t - train.warmup_steps) / max(1, last - train.warmup_steps)
    return train.minimum_lr_ratio + (1.0 - train.minimum_lr_ratio) * (1.0 + math.cos(math.pi * progress)) / 2
