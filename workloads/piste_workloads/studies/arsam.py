"""ARSAM: is it as accurate as SAM, at 1.4 times its throughput, and does the PSF gain weight in training?

The paper's tasks are CIFAR-10 and CIFAR-100, human pose estimation and model quantization, each in trainings
of a GPU's hours. Here they are tasks of a processor's seconds: digits with wrong labels, patches of
photographs, a mouse's keypoints and a quantized network. ARSAM is this project's preset `mode = "robust"`:
the released code's schedule takes about 1,500 windows of 50 steps to come near SAM, and these trainings have
10 to 19; what it does in them is a claim of its own.

All optimizers of a task have the same base optimizer with the same learning rate, the same radius and the
same steps, and are compared in pairs of the same seed. The radius was chosen for SAM, on other seeds. "As
accurate" is non-inferiority by one point: the whole interval of the difference is above -1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from piste.running import RunResult, load_recipe
from piste.studies import Claim, Lab

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sam": {"name": "sam"},
    "arsam": {"name": "arsam"},
    "paper": {"name": "arsam", "mode": "paper"},
    "looksam": {"name": "looksam"},
    "aesam": {"name": "aesam"},
}


class Task(NamedTuple):
    """What the optimizers are compared on.

    Attributes:
        recipe: Its `[optimizer]` says the radius, `[optimizer.base]` the base optimizer.
        metric: From 0 to 1, of a test part by which nothing is chosen.
    """

    recipe: str
    metric: str


TASKS = {
    "digits": Task("digits-noise", "test/accuracy"),
    "photos": Task("arsam-photos", "test/accuracy"),
    "pose": Task("arsam-pose", "test/pck"),
    "quantization": Task("arsam-quantization", "test/accuracy"),
}


class Scale(NamedTuple):
    """How large the study is.

    Attributes:
        seeds: Of every run.
        lrs: What SGD's learning rate is chosen from, where it has its own.
        overrides: Of each task's recipe, for every run.
    """

    seeds: int
    lrs: tuple[float, ...]
    overrides: Mapping[str, Mapping[str, Any]]


scales = {
    "small": Scale(5, (0.006, 0.0125, 0.025, 0.05, 0.1), {}),
    "full": Scale(
        5,
        (0.003, 0.006, 0.0125, 0.025, 0.05, 0.1),
        {
            "digits": {"train__epochs": 240},
            "photos": {"model__name": "resnet18", "model__width": None, "train__epochs": 60},
            "pose": {"data__height": 120, "data__width": 160, "model__width": 16, "train__epochs": 300},
            "quantization": {"train__epochs": 240},
        },
    ),
}


def trained(lab: Lab, task: str, name: str, **overrides: Any) -> list[RunResult]:
    """The runs of a task with one optimizer, one a seed."""
    recipe, metric = TASKS[task]
    settings = {**lab.scale.overrides.get(task, {}), **overrides}
    return lab.runs(recipe, metric, lab.scale.seeds, optimizer=optimizer(recipe, name), **settings)


def optimizer(recipe: str, name: str) -> dict[str, Any]:
    """A recipe's `[optimizer]` with one of `OPTIMIZERS` in place of its own, or its base alone (`"base"`)."""
    section = load_recipe(recipe).optimizer
    base = section.chain[-1]
    alone = {"name": base.name, **base.options}
    return alone if name == "base" else {**OPTIMIZERS[name], "rho": section.options["rho"], "base": alone}


def points(lab: Lab, task: str, name: str, **overrides: Any) -> list[float]:
    """The score of a task in per cent, one a seed."""
    return [100 * run.metrics[TASKS[task].metric] for run in trained(lab, task, name, **overrides)]


def difference(task: str, other: str, name: str = "arsam", **overrides: Any) -> Callable[[Lab], list[float]]:
    """One optimizer's score less another's, in points, one a seed."""

    def measure(lab: Lab) -> list[float]:
        ours, theirs = (points(lab, task, each, **overrides) for each in (name, other))
        return [a - b for a, b in zip(ours, theirs, strict=True)]

    return measure


def over_tuned_sgd(lab: Lab) -> list[float]:
    """ARSAM's accuracy on the digits less that of SGD at SGD's best learning rate, in points."""
    recipe, metric = TASKS["digits"]
    settings = {"optimizer": optimizer(recipe, "base"), **lab.scale.overrides.get("digits", {})}
    found = lab.grid(recipe, metric, {"optimizer.lr": lab.scale.lrs}, lab.scale.seeds, **settings)
    best = max(found.values(), key=math.fsum)
    ours = points(lab, "digits", "arsam")
    return [a - 100 * b for a, b in zip(ours, best, strict=True)]


def throughput(task: str, **overrides: Any) -> Callable[[Lab], list[float]]:
    """SAM's processor time in training over ARSAM's, for the same steps, one a seed."""
    return _ratio_of(task, "time/cpu_s", overrides)


def counted_throughput(task: str, **overrides: Any) -> Callable[[Lab], list[float]]:
    """SAM's gradient evaluations over ARSAM's, for the same steps, one a seed."""
    return _ratio_of(task, "cost/gradient_evaluations", overrides)


def _ratio_of(task: str, metric: str, overrides: Mapping[str, Any]) -> Callable[[Lab], list[float]]:
    def measure(lab: Lab) -> list[float]:
        sam, arsam = (trained(lab, task, name, **overrides) for name in ("sam", "arsam"))
        return [a.metrics[metric] / b.metrics[metric] for a, b in zip(sam, arsam, strict=True)]

    return measure


def psf_growth(task: str) -> Callable[[Lab], list[float]]:
    """`||PSF|| / ||g||` over the last third of ARSAM's epochs, over that of the first third, one a seed.

    An epoch's is that of its last second pass.
    """

    def measure(lab: Lab) -> list[float]:
        return [
            _growth([value for _, value in run.history("optimizer/psf_ratio")])
            for run in trained(lab, task, "arsam")
        ]

    return measure


def _growth(values: list[float]) -> float:
    third = len(values) // 3
    return math.fsum(values[-third:]) / math.fsum(values[:third])


PAPER = "the paper's abstract"
OWN = "this project's question; the abstract does not say so"
EQUAL = f"{PAPER} (accuracy comparable to SAM); the margin is this project's"
FASTER = f"{PAPER} (about 40 % faster than SAM), read as 1.4 times its throughput"
GROWS = f"{PAPER} (the PSF's role grows in training); how it is measured is this project's"

claims = (
    Claim(
        "digits-accuracy",
        "On digits with wrong labels ARSAM's accuracy is at most one point below SAM's.",
        EQUAL,
        -1.0,
        "above",
        "supported",
        difference("digits", "sam"),
        unit="points",
    ),
    Claim(
        "digits-over-sgd",
        "On digits with wrong labels ARSAM's accuracy is at least 4 points above SGD's.",
        OWN,
        4.0,
        "above",
        "supported",
        difference("digits", "base"),
        unit="points",
    ),
    Claim(
        "digits-over-tuned-sgd",
        "On digits with wrong labels ARSAM is more accurate than SGD at SGD's best learning rate.",
        OWN,
        0.0,
        "above",
        "supported",
        over_tuned_sgd,
        unit="points",
        note="ARSAM keeps the recipe's rate; SGD's is chosen on these very seeds, which flatters SGD.",
    ),
    Claim(
        "digits-paper-schedule",
        "The released code's schedule, too, is at most one point below SAM in a training of 18 windows.",
        OWN,
        -1.0,
        "above",
        "refuted",
        difference("digits", "sam", "paper"),
        unit="points",
        note="It begins with one second pass in 50 steps and takes about 1,500 windows to reach four in ten.",
    ),
    Claim(
        "digits-better-than-looksam",
        "On digits with wrong labels ARSAM is more accurate than LookSAM (a second pass every 5 steps).",
        OWN,
        0.0,
        "above",
        "inconclusive",
        difference("digits", "looksam"),
        unit="points",
    ),
    Claim(
        "digits-better-than-aesam",
        "On digits with wrong labels ARSAM is more accurate than AE-SAM.",
        OWN,
        0.0,
        "above",
        "supported",
        difference("digits", "aesam"),
        unit="points",
    ),
    Claim(
        "digits-psf-grows",
        "On digits with wrong labels ||PSF|| / ||g|| is larger in training's last third than in its first.",
        GROWS,
        1.0,
        "above",
        "refuted",
        psf_growth("digits"),
    ),
    Claim(
        "photos-accuracy",
        "On patches of photographs a conv net's accuracy with ARSAM is at most one point below SAM's.",
        EQUAL,
        -1.0,
        "above",
        "inconclusive",
        difference("photos", "sam"),
        unit="points",
        note="Recorded after a first run: 0.16 points below; with 95 % confidence 2.0 below to 1.7 above.",
    ),
    Claim(
        "photos-throughput",
        "A conv net's training on patches takes SAM at least 1.4 times as much processor time as ARSAM.",
        FASTER,
        1.4,
        "above",
        "inconclusive",
        throughput("photos"),
        paper_figure=1.4,
        note="Recorded after three runs: 1.30, 1.37 and 1.48. The two are not trained at the same time.",
    ),
    Claim(
        "photos-counted-throughput",
        "For the same steps SAM computes at least 1.4 times as many gradients as ARSAM.",
        FASTER,
        1.4,
        "above",
        "supported",
        counted_throughput("photos"),
        paper_figure=1.4,
        note="A count: exact.",
    ),
    Claim(
        "photos-psf-grows",
        "On patches ||PSF|| / ||g|| is larger in training's last third than in its first.",
        GROWS,
        1.0,
        "above",
        "supported",
        psf_growth("photos"),
    ),
    Claim(
        "pose-accuracy",
        "On a mouse's keypoints ARSAM's PCK is at most one point below SAM's.",
        EQUAL,
        -1.0,
        "above",
        "inconclusive",
        difference("pose", "sam"),
        unit="points",
        note="One of the 140 keypoints that are tested is 0.7 points.",
    ),
    Claim(
        "pose-throughput",
        "Training on a mouse's keypoints takes SAM at least 1.4 times as much processor time as ARSAM.",
        FASTER,
        1.4,
        "above",
        "supported",
        throughput("pose"),
        paper_figure=1.4,
        note="Recorded after two runs: 1.40 on a busy machine, 1.51 on one that was not.",
    ),
    Claim(
        "quantization-accuracy",
        "With weights and activations of 4 bits ARSAM's accuracy is at most one point below SAM's.",
        EQUAL,
        -1.0,
        "above",
        "supported",
        difference("quantization", "sam"),
        unit="points",
    ),
    Claim(
        "quantization-2-bits-accuracy",
        "With weights and activations of 2 bits ARSAM's accuracy is at most one point below SAM's.",
        EQUAL,
        -1.0,
        "above",
        "inconclusive",
        difference("quantization", "sam", quantization__bits=2),
        unit="points",
        note="Recorded after a first run: 1.1 points below; with 95 % confidence 3.0 below to 0.7 above.",
    ),
    Claim(
        "quantization-throughput",
        "Training with 4 bits takes SAM at least 1.4 times as much processor time as ARSAM.",
        FASTER,
        1.4,
        "above",
        "supported",
        throughput("quantization"),
        paper_figure=1.4,
        note="Recorded after three runs: 1.51, 1.39 and 1.48.",
    ),
)
