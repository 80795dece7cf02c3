"""ARSAM: SAM's second gradient on some steps, what it adds to the gradient reused on the others.

With `g` the gradient, `g_s` SAM's and `PSF = g_s - g` (the projection of the second-order gradient onto the
first-order one), training goes in windows of `K` steps, of which `int(s)` are SAM's, at random places:

    SAM's step:    PSF <- g_s - g,  j <- 0,  the base optimizer steps with g_s
    another one:   j <- j + 1,      the base optimizer steps with g + gamma^j c PSF while j <= reuse_max
                                    (c = 1, or ||g|| / ||g at the sample||), with g after that

How many of a window's steps are SAM's follows from what the last samples found. Of each, `b = ||PSF||` and
`r = ||PSF|| / ||g||`, over the last `norm_tensors` tensors, enter rings of `K` values; `v` is the variance
of `b` within blocks of the sorted ring. At the end of a window::

    dR = mean_i (r[i+1] - r[i]) / r[i],  dV = mean_i (v[i+1] - v[i]) / v[i],  each within [-1, 1]
    s <- s (1 + alpha_1 dR + alpha_2 dV), within [frac_min K, frac_max K]

Relative changes of noisy positive numbers have a positive mean, so `s` grows: training is like SGD at first
and like SAM at the end, after about 1,500 windows. `mode="paper"` is that schedule, as the authors' released
code has it; `mode="robust"`, the default here, begins with a fifth of the steps and stays above, for shorter
trainings, and scales what it reuses.

`1 + s / K` gradient evaluations a step. The choice of the steps hangs on `seed`, the step and norms of the
gradients alone: ranks with averaged gradients choose alike. `sam.py` says what the closure does.

Source: "Adaptively Sampling-Reusing-Mixing Decomposed Gradients to Speed Up Sharpness-Aware Minimization"
(vSAM, arXiv:2403.08821) and its released code, which is followed where the text is silent.
"""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from piste_algorithms._checks import check_integer, check_range
from piste_algorithms.optimizers._ascent import EPS, Sample, SharpnessAware, present_gradients

MODES: dict[str, dict[str, Any]] = {
    "paper": {"frac_max": 0.8, "budget": 1.0, "gamma": 0.7, "reuse_scale": "none", "norm_tensors": 10},
    "robust": {"frac_max": 0.8, "budget": 0.45, "gamma": 0.9, "reuse_scale": "norm", "norm_tensors": None},
}
REUSE_SCALES = ("none", "norm")


def block_variance(values: Sequence[float], blocks: int) -> float:
    """The mean over `blocks` equal parts of the sorted values of the variance within a part."""
    parts = np.array_split(np.sort(values), min(blocks, len(values)))
    return float(np.mean([part.var() for part in parts]))


def mean_relative_change(values: Sequence[float]) -> float:
    """The mean of `(v[i+1] - v[i]) / v[i]` within [-1, 1]; 0 where no `v[i]` is at least 1e-12."""
    changes = [(after - before) / before for before, after in itertools.pairwise(values) if before >= EPS]
    return max(-1.0, min(1.0, math.fsum(changes) / len(changes))) if changes else 0.0


class ARSAM(SharpnessAware):
    """ARSAM around any optimizer.

    Where `g` or `g_s` is not finite, the base steps with `g`, and nothing of it is kept: PSF and its age stay
    what they were. Parameters without a gradient in both passes have no PSF until the next sample. Otherwise
    as `SAM`; `samples_per_window` is `s`.

    The paper's trainings begin with three epochs of SAM: give their steps as `warmup_steps`. Its norms are of
    the last 10 tensors of the model: of `model.parameters()` where `model` is given, of the groups otherwise.

    Args:
        base: a built optimizer, which takes the steps; its groups are this one's.
        rho: radius of the ascent, positive.
        mode: `"robust"` or `"paper"`, from which the arguments left at None have their values.
        window: K, the steps of a window, at least 1.
        blocks: parts of the sorted ring, at least 1.
        alpha: gains of dR and dV, each at least 0.
        frac_init: s / K of the first window, in [frac_min, frac_max]. Robust 0.2, paper 1 / K.
        frac_min: lower bound of s / K, in [0, frac_max]. Robust 0.2, paper 1 / K.
        frac_max: upper bound of s / K, in [0, 1]; 0 never takes a second pass, not even the first. 0.8.
        budget: where more than this fraction of the steps after the warm-up had a second pass, it is the
            upper bound of s / K in the next window, though never below frac_min; in [0, 1], 1 is no bound.
            Robust 0.45, paper 1.
        gamma: decay of the reused PSF, in [0, 1]; 0 reuses nothing. Robust 0.9, paper 0.7.
        reuse_max: steps on which a PSF is reused, at least 0.
        reuse_scale: `"norm"` scales the reused PSF as the gradient's norm has changed since the sample,
            `"none"` does not. Robust `"norm"`, paper `"none"`.
        warmup_steps: first steps, which are all SAM's, at least 0.
        norm_tensors: how many tensors, the last ones, the statistics are of, at least 1. Robust all, paper
            10.
        seed: draws the places of a window's second passes; no other generator is touched.
        adaptive: whether each entry of the ascent is scaled by the square of its weight.
        model: the model; its normalisation layers keep the running statistics of the first pass alone.

    Raises:
        ValueError: if an argument is outside its range.
    """

    test_settings: ClassVar[dict[str, Any]] = {
        "base": {"name": "adamw", "lr": 0.2, "weight_decay": 0.0},
        "rho": 0.005,
    }
    test_schedule: ClassVar[str] = "linear"
    memory: ClassVar[tuple[str, ...]] = (
        *SharpnessAware.memory,
        "seed",
        "samples_per_window",
        "earlier_samples",
        "warmup_samples",
        "since_sample",
        "sampled_norm",
        "psf_norms",
        "psf_ratios",
        "variances",
    )

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        mode: str = "robust",
        window: int = 50,
        blocks: int = 5,
        alpha: tuple[float, float] = (0.13, 0.13),
        frac_init: float | None = None,
        frac_min: float | None = None,
        frac_max: float | None = None,
        budget: float | None = None,
        gamma: float | None = None,
        reuse_max: int = 6,
        reuse_scale: str | None = None,
        warmup_steps: int = 0,
        norm_tensors: int | None = None,
        seed: int = 0,
        adaptive: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        check_integer("window", window, low=1)
        check_integer("blocks", blocks, low=1)
        check_integer("reuse_max", reuse_max, low=0)
        check_integer("warmup_steps", warmup_steps, low=0)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        if not isinstance(alpha, tuple | list) or len(alpha) != 2:
            raise ValueError(f"alpha must be a pair of numbers in [0, inf), got {alpha!r}")
        for index, gain in enumerate(alpha):
            check_range(f"alpha[{index}]", gain, low=0.0)
        chosen = MODES[mode]
        self.budget = _fraction("budget", chosen["budget"] if budget is None else budget)
        self.gamma = _fraction("gamma", chosen["gamma"] if gamma is None else gamma)
        self.reuse_scale = chosen["reuse_scale"] if reuse_scale is None else reuse_scale
        if self.reuse_scale not in REUSE_SCALES:
            raise ValueError(
                f"reuse_scale must be one of {', '.join(map(repr, REUSE_SCALES))}, got {reuse_scale!r}"
            )
        if norm_tensors is not None:
            check_integer("norm_tensors", norm_tensors, low=1)
        self.norm_tensors: int | None = chosen["norm_tensors"] if norm_tensors is None else norm_tensors
        # The mode's fractions give way to a bound that is given.
        least = 0.2 if mode == "robust" else 1 / window
        self.frac_max = _fraction("frac_max", chosen["frac_max"] if frac_max is None else frac_max)
        self.frac_min = _fraction("frac_min", min(least, self.frac_max) if frac_min is None else frac_min)
        bounded = max(self.frac_min, min(least, self.frac_max))
        self.frac_init = _fraction("frac_init", bounded if frac_init is None else frac_init)
        if not self.frac_min <= self.frac_init <= self.frac_max:
            raise ValueError(
                "frac_min <= frac_init <= frac_max must hold, "
                f"got {self.frac_min:g}, {self.frac_init:g}, {self.frac_max:g}"
            )
        super().__init__(base, rho, adaptive, model)
        self.window = window
        self.blocks = blocks
        self.alpha = tuple(alpha)
        self.reuse_max = reuse_max
        self.warmup_steps = warmup_steps
        self.seed = seed
        self.samples_per_window = self.frac_init * window
        self.earlier_samples = 0  # second passes before this window
        self.warmup_samples = 0  # those of the warm-up
        self.since_sample: int | None = None  # j, None where there is no PSF yet
        self.sampled_norm = 0.0  # ||g|| at the sample
        self.psf_norms: list[float] = []
        self.psf_ratios: list[float] = []
        self.variances: list[float] = []

    def _chooses_second_pass(self, norm: float) -> bool:
        if self.frac_max == 0:
            return False
        position = (self.steps - self.warmup_steps) % self.window
        if self.steps >= self.warmup_steps and position == 0:
            self._open_window()
        if self.steps < self.warmup_steps or self.since_sample is None:
            return True
        quota = int(self.samples_per_window + 1e-9)  # K (1 / K) may be a rounding below 1
        left = quota - (self.sam_steps - self.earlier_samples)
        draw = random.Random(f"{self.seed} {self.steps}").random()
        return left >= self.window - position or (left > 0 and draw < self.samples_per_window / self.window)

    def _open_window(self) -> None:
        if self.steps == self.warmup_steps:
            self.warmup_samples = self.sam_steps
        else:
            taken = (self.sam_steps - self.warmup_samples) / (self.steps - self.warmup_steps)
            most = self.frac_max
            if taken > self.budget:
                most = max(self.frac_min, min(self.budget, most))
            # s <- s (1 + alpha_1 dR + alpha_2 dV), within [frac_min K, frac_max K]
            growth = self.alpha[0] * mean_relative_change(self.psf_ratios)
            growth += self.alpha[1] * mean_relative_change(self.variances)
            grown = max(self.samples_per_window * (1 + growth), self.frac_min * self.window)
            self.samples_per_window = min(grown, most * self.window)
        self.earlier_samples = self.sam_steps

    def _keep(self, sample: Sample) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].pop("psf", None)
        for parameter, psf in zip(sample.parameters, sample.psf, strict=True):
            self.state[parameter]["psf"] = psf
        self.since_sample = 0
        self.sampled_norm = sample.norm
        last = self._last(sample.parameters)
        # b = ||PSF||,  r = ||PSF|| / ||g||, of the last tensors
        psf_norm = math.hypot(*(sample.psf_norms[index] for index in last))
        norm = math.hypot(*(sample.gradient_norms[index] for index in last))
        self.psf_norms = [*self.psf_norms, psf_norm][-self.window :]
        if norm > 0:
            self.psf_ratios = [*self.psf_ratios, psf_norm / norm][-self.window :]
        variance = block_variance(self.psf_norms, self.blocks)
        self.variances = [*self.variances, variance][-self.window :]

    def _last(self, parameters: list[Tensor]) -> Sequence[int]:
        """The indices of the last `norm_tensors` of the parameters, in the model's order if it is known."""
        indices: Sequence[int] = range(len(parameters))
        if self.norm_tensors is None:
            return indices
        if self.model is not None:
            places = {id(parameter): place for place, parameter in enumerate(self.model.parameters())}
            indices = sorted(indices, key=lambda index: places.get(id(parameters[index]), -1))
        return indices[-self.norm_tensors :]

    def _reuse(self, parameters: list[Tensor], norm: float) -> None:
        if self.since_sample is None:
            return
        self.since_sample += 1
        scale = self.gamma**self.since_sample
        if self.reuse_scale == "norm":
            scale *= norm / self.sampled_norm if self.sampled_norm > 0 else 0.0
        if self.since_sample > self.reuse_max or scale == 0:
            return
        found = [parameter for parameter in parameters if "psf" in self.state[parameter]]
        if found:
            # g <- g + gamma^j c PSF
            torch._foreach_add_(
                present_gradients(found),
                [self.state[parameter]["psf"] for parameter in found],
                alpha=scale,
            )


def _fraction(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    return float(value)
