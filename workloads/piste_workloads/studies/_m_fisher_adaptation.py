"""The study of M-FISHER, its adaptation: digits that are corrupted for a while, by each of four corruptions.

A sample is a seed: its classifier, its images, and the mean over the four corruptions of the accuracy while
they last, the delay until the alarm included. All adapters see the same images. The number of steps a batch
and the damping of the Fisher prompt were chosen once, on seeds 100 and 101, which are not among those here;
so was the step size of SGD "searched", the best of 0.003, 0.01, 0.03 and 0.1 with one step a batch and with
four. TENT and entropy matching have their default step sizes, one step a batch: with more or larger ones
they fall further below the classifier that is left alone, but for TENT with the batch's own statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from piste.running import RunResult, load_recipe
from piste.studies import Claim, Lab
from piste.verdicts import Estimate
from piste_algorithms.adaptation import AdaptiveStream
from piste_algorithms.martingales import FisherScore
from piste_workloads.stream import Config
from piste_workloads.stream.images import Monitored, material
from piste_workloads.stream.pictures import draw
from piste_workloads.studies._m_fisher_pictures import keep
from piste_workloads.studies._m_fisher_streams import LEVEL, proportion

RECIPE, COORDINATES = "adapt-images", "adapt-invariance"
CORRUPTIONS = ("noise", "blur", "contrast", "rotation")

# A classifier of small digits, which is trained in a second, for many streams without a shift.
DIGITS = {
    "images.dataset": "digits",
    "images.train": 500,
    "images.reference": 200,
    "source.calibration": 500,
    "source.events": 575,
    "source.onset": 575,
}


# -- accuracy and calibration under corruptions --------------------------------------------------------


def corrupted(lab: Lab, corruption: str) -> list[RunResult]:
    """The runs of a corruption, one a seed."""
    return lab.runs(RECIPE, "accuracy_during/fisher", lab.scale.adapted_seeds, images__corruption=corruption)


def _means(lab: Lab, metric: str) -> list[float]:
    """The mean of a metric over the corruptions, one a seed."""
    of_corruptions = [[run.metrics[metric] for run in corrupted(lab, each)] for each in CORRUPTIONS]
    return [math.fsum(values) / len(values) for values in zip(*of_corruptions, strict=True)]


def against(other: str, metric: str = "accuracy_during") -> Callable[[Lab], list[float]]:
    """The Fisher prompt's metric less another adapter's."""

    def measure(lab: Lab) -> list[float]:
        ours, theirs = (_means(lab, f"{metric}/{name}") for name in ("fisher", other))
        return [a - b for a, b in zip(ours, theirs, strict=True)]

    return measure


def above_unadapted(lab: Lab) -> list[float]:
    """The same against the classifier that is left alone, and the picture of all."""
    _picture(lab)
    return against("none")(lab)


def _picture(lab: Lab) -> None:
    """Accuracy over the stream by adapter, a panel a corruption, the mean of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 7.0), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
    for axes, corruption in zip(panels, CORRUPTIONS, strict=True):
        runs = corrupted(lab, corruption)
        config = load_recipe(RECIPE, {"images.corruption": corruption})
        assert isinstance(config, Config)
        lines = {name: _mean_line(runs, f"accuracy/{name}", config.stream.batch) for name in config.adapters}
        draw(axes, lines, (config.source.onset, config.images.until), [])
        axes.set_title(corruption, fontsize=10, loc="left")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    keep("adaptation", figure)


def _mean_line(runs: Sequence[RunResult], metric: str, size: int) -> tuple[list[int], list[float]]:
    """The number of the last image of each batch of that size, and the mean of the runs."""
    histories = [dict(run.history(metric)) for run in runs]
    steps = sorted(histories[0])
    return [step * size for step in steps], [
        math.fsum(each[step] for each in histories) / len(histories) for step in steps
    ]


# -- other coordinates -----------------------------------------------------------------------------------


def apart(adapter: str, what: str) -> Callable[[Lab], list[float]]:
    """How far an adapter and its twin in other coordinates come apart, one a seed."""
    metric = f"{what}_difference/{adapter}"

    def measure(lab: Lab) -> list[float]:
        runs = lab.runs(COORDINATES, "prompt_difference/fisher", lab.scale.adapted_seeds)
        return [run.metrics[metric] for run in runs]

    return measure


# -- streams without a shift -------------------------------------------------------------------------------


def null_runs(runs: int) -> dict[str, float]:
    """Streams without a shift, each with a calibration sample of its own, of one classifier's digits.

    Args:
        runs: How many.

    Returns:
        `updated`, the share of them in which the prompt changed, and `differing`, how many logits of batches
        before any alarm were not the classifier's own to the last bit.
    """
    config = load_recipe(RECIPE, dict(DIGITS))
    assert isinstance(config, Config)
    shared = material(config)
    pool = torch.cat([shared.calibration, shared.stream.x])
    score = FisherScore(Monitored(shared.network), shared.reference, config.images.alpha)
    section = config.adapters["fisher"]
    adapter = section.build(shared.network, shared.reference[0])
    assert adapter is not None
    adapter.fit_source(shared.reference)
    updated, differing = 0, 0
    for seed in range(runs):
        adapter.reset()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(pool), generator=generator)
        calibration, events = torch.split(pool[order], [len(shared.calibration), len(shared.stream)])
        detector: Any = next(iter(config.detectors.values())).build()
        detector.calibrate(score(calibration))
        stream = AdaptiveStream(detector, adapter, score, steps=config.images.steps, repeats=section.repeats)
        for batch in torch.split(events, config.images.batch):
            logits = stream.process(batch)
            if not stream.alarms:
                differing += int((logits != shared.network(batch)).sum())
        updated += stream.adapted
    return {"updated": updated / runs, "differing": float(differing)}


def _null(lab: Lab) -> dict[str, float]:
    found: dict[str, float] = lab.measured(null_runs, runs=lab.scale.null_runs)
    return found


def updated_without_shift(lab: Lab) -> Estimate:
    """The share of streams without a shift whose prompt changed."""
    return proportion(_null(lab)["updated"], lab.scale.null_runs)


def differing_logits(lab: Lab) -> Estimate:
    """Logits before any alarm that are not the classifier's; a count, not a sample."""
    count = _null(lab)["differing"]
    return Estimate(count, count, count)


ABSTRACT = "the paper's abstract (adaptation under shift); how it is measured is this project's"
TABLES = "the paper's tables, as their summaries give them (accuracy up, calibration error down)"
GEOMETRY = "this project's reading of Fisher preconditioning; the paper's abstract does not say so"
LEFT_ALONE = "this project's reading of adaptation on alarm only"


RUNNING = "At its default step size; batch normalisation keeps the statistics of training."


def _above(name: str, title: str, expectation: Any, note: str = "") -> Claim:
    return Claim(
        f"adapted-above-{name}",
        f"While images are corrupted the Fisher prompt is right more often than {title}.",
        ABSTRACT,
        0.0,
        "above",
        expectation,
        above_unadapted if name == "none" else against(name),
        note=note,
    )


def adaptation_claims() -> tuple[Claim, ...]:
    """The claims; `lab.scale` has `adapted_seeds` and `null_runs`."""
    return (
        _above("none", "the classifier that is left alone", "supported", "0.81 against 0.49."),
        _above(
            "tent",
            "TENT, which normalises by the batch's own statistics",
            "refuted",
            "0.81 against 0.86, most of which is the statistics.",
        ),
        _above("tent-gains", "TENT's objective on the same gains and shifts", "supported", RUNNING),
        _above("entropy-matching", "entropy matching at its default step size", "supported", RUNNING),
        _above(
            "sgd",
            "SGD on the same prompt and objective at a step size of 0.1",
            "inconclusive",
            "0.81 against 0.79: above it under noise, blur and rotation, below it under contrast.",
        ),
        _above(
            "sgd-searched",
            "the same SGD at the best of eight settings, four step sizes with one or four steps a batch",
            "refuted",
            "0.81 against 0.85: below it under each of the four.",
        ),
        Claim(
            "adapted-calibration",
            "While images are corrupted its expected calibration error is below the unadapted classifier's.",
            TABLES,
            0.0,
            "below",
            "supported",
            against("none", "ece_during"),
        ),
        Claim(
            "coordinates-prompt",
            "Added to images, in coordinates of condition 1e4, the Fisher prompt moves the same to 1e-3.",
            GEOMETRY,
            1e-3,
            "below",
            "supported",
            apart("fisher", "prompt"),
        ),
        Claim(
            "coordinates-prediction",
            "And predicts the same to 1e-3.",
            GEOMETRY,
            1e-3,
            "below",
            "supported",
            apart("fisher", "prediction"),
        ),
        Claim(
            "coordinates-even",
            "Damped by even labels it moves the same to 1e-3, too.",
            GEOMETRY,
            1e-3,
            "below",
            "supported",
            apart("fisher-even", "prompt"),
        ),
        Claim(
            "coordinates-gains",
            "So it does where it is gains and shifts of normalisation layers.",
            GEOMETRY,
            1e-3,
            "below",
            "refuted",
            apart("fisher-gains", "prompt"),
            note="Some of their directions change no prediction; these no rule can treat alike.",
        ),
        Claim(
            "coordinates-identity",
            "Damped by the identity, it moves otherwise: by more than a tenth of its way.",
            GEOMETRY,
            0.1,
            "above",
            "supported",
            apart("fisher-identity", "prompt"),
        ),
        Claim(
            "coordinates-sgd",
            "SGD moves otherwise by more than its whole way.",
            GEOMETRY,
            1.0,
            "above",
            "supported",
            apart("sgd", "prompt"),
        ),
        Claim(
            "coordinates-adam",
            "So does Adam.",
            GEOMETRY,
            1.0,
            "above",
            "supported",
            apart("adam", "prompt"),
        ),
        Claim(
            "no-shift-no-update",
            "Without a shift at most 5 % of streams ever change the prompt.",
            LEFT_ALONE,
            LEVEL,
            "below",
            "supported",
            updated_without_shift,
            note="Streams of 575 digits, each drawn anew from one pool of 1,075.",
        ),
        Claim(
            "no-alarm-no-change",
            "Before an alarm no logit differs from the classifier's in any bit.",
            LEFT_ALONE,
            0.0,
            "below",
            "supported",
            differing_logits,
        ),
    )
