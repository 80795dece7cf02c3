"""How accurate ARSAM is next to SGD, SAM, LookSAM and AE-SAM, on digits with wrong labels and on CIFAR-10.

Run: `python tests/bench/bench_arsam_accuracy.py [--seeds 5] [--curves FOLDER]`. The digits are the recipe
`digits-noise` with every optimizer at the recipe's radius: the mean of the test accuracy and its standard
error, and what ARSAM is to reach, PASS or MISS; exit code 1 if it misses.

`--curves FOLDER` also trains the recipe `arsam-cifar10` once with each, draws its test accuracy against CPU
seconds in training into `FOLDER/arsam-cifar10.png` and keeps the numbers in `FOLDER/arsam-cifar10.csv`. It
takes about 25 minutes on one core and needs CIFAR-10 (PISTE_DATA). CPU seconds are those of training steps,
evaluations left out.

Both go through the ledger of a home of their own, one thread.
"""

import argparse
import csv
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from piste.errors import BadInput
from piste.running import RunResult
from piste.studies import Lab
from piste_workloads.data import load
from piste_workloads.studies.arsam import optimizer

NAMES = {"base": "SGD", "sam": "SAM", "looksam": "LookSAM", "aesam": "AE-SAM", "arsam": "ARSAM"}
ACCURACY, SECONDS, EVALUATIONS = "test/accuracy", "time/cpu_s", "cost/gradient_evaluations"
COLUMNS = ("optimizer", "epoch", "gradient_evaluations", "cpu_seconds", "test_accuracy")


def digits(lab: Lab, seeds: int) -> bool:
    """Prints the accuracies on digits with wrong labels; returns whether ARSAM has missed a target."""
    means = {}
    print(f"digits with 40 % random labels, {seeds} seeds: test accuracy in %, mean and standard error")
    for name, shown in NAMES.items():
        runs = lab.runs("digits-noise", ACCURACY, seeds, optimizer=optimizer("digits-noise", name))
        found = [100 * run.metrics[ACCURACY] for run in runs]
        error = statistics.stdev(found) / math.sqrt(seeds)
        evaluations = statistics.fmean(run.metrics[EVALUATIONS] for run in runs)
        means[name] = statistics.fmean(found)
        print(f"{shown:<8} {means[name]:6.2f} +- {error:4.2f} {evaluations:7.0f} gradient evaluations")
    missed = False
    for other, least in (("sam", -1.0), ("base", 4.0)):
        gained = means["arsam"] - means[other]
        missed |= gained < least
        verdict = "PASS" if gained >= least else "MISS"
        print(f"ARSAM - {NAMES[other]:<44} {gained:+6.2f} points  >= {least:+g}  {verdict}", flush=True)
    return missed


def curves(lab: Lab, folder: Path) -> None:
    """Trains on CIFAR-10 with each optimizer; keeps the numbers and draws them."""
    found: dict[str, list[tuple[int, float, float, float]]] = {}
    for name, shown in NAMES.items():
        (run,) = lab.runs("arsam-cifar10", ACCURACY, 1, optimizer=optimizer("arsam-cifar10", name))
        found[shown] = rows(run)
        epoch, evaluations, seconds, accuracy = found[shown][-1]
        print(
            f"{shown:<8} {epoch} epochs, {evaluations:.0f} gradient evaluations, {seconds:.0f} CPU s, "
            f"test accuracy {100 * accuracy:.2f} %",
            flush=True,
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "arsam-cifar10.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for shown, points in found.items():
            writer.writerows((shown, e, f"{n:.0f}", f"{s:.2f}", f"{a:.4f}") for e, n, s, a in points)
    draw(found).savefig(folder / "arsam-cifar10.png", dpi=120)
    print(f"drawn: {folder / 'arsam-cifar10.png'}, {folder / 'arsam-cifar10.csv'}")


def rows(run: RunResult) -> list[tuple[int, float, float, float]]:
    """Epoch, gradient evaluations and CPU seconds so far, and test accuracy, of each epoch of a run."""
    seconds, evaluations = dict(run.history(SECONDS)), dict(run.history(EVALUATIONS))
    measured = run.history(ACCURACY)
    return [
        (epoch, evaluations[step], seconds[step], accuracy)
        for epoch, (step, accuracy) in enumerate(measured, start=1)
    ]


def draw(found: dict[str, list[tuple[int, float, float, float]]]) -> Figure:
    """Accuracy against CPU seconds, a curve an optimizer."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for shown, points in found.items():
        axes.plot([p[2] for p in points], [100 * p[3] for p in points], marker=".", label=shown)
    axes.set(
        xlabel="CPU seconds in training (one thread)",
        ylabel="test accuracy in %",
        title="ResNet-8 on 10,000 images of CIFAR-10, one seed\n"
        "python tests/bench/bench_arsam_accuracy.py --curves docs/pictures",
    )
    axes.title.set_fontsize("small")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--curves", type=Path, help="where to draw accuracy against CPU seconds on CIFAR-10")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        os.environ["PISTE_HOME"] = home
        lab = Lab(local=True)
        missed = digits(lab, options.seeds)
        if options.curves is None:
            print("CIFAR-10: left out; --curves FOLDER draws it")
            return int(missed)
        try:
            load("cifar10", split="test")
        except BadInput as error:
            print(f"CIFAR-10: skipped: {error}")
            return int(missed)
        curves(lab, options.curves)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
