"""What ARSAM costs next to SGD, SAM, LookSAM and AE-SAM, and how far SAM is from `pytorch_optimizer.SAM`.

Run: `python tests/bench/bench_arsam.py [--threads 1] [--windows 4]`. One line a figure: name, ours, peer,
ratio, target, PASS or MISS; exit code 1 if one misses.

A network of three convolutions with batch normalisation learns from batches of 64 pictures, 3x32x32, under
each optimizer. The optimizers take their steps in turn, so that what else the machine does hits all alike;
time is the CPU time of this process. A figure is the median over ARSAM's windows of 50 steps of the mean time
of a step; a ratio is the median over windows of the ratio of these means. *Bookkeeping* is what a step takes
beyond its gradient evaluations and the base's step.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.algorithms.sam_peer import difference_from_peer
from tests.bench.bench_optimizers import Table

from piste_algorithms.optimizers import AESAM, ARSAM, SAM, LookSAM

WINDOW = 50


class ConvNet(nn.Sequential):
    """Three convolutions with pooling, and a linear head: 3x32x32 pictures, 10 classes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        widths = (3, 32, 64, 64)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 10))


class Timed:
    """A function that adds up its CPU time."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        start = time.process_time()
        result = self.function(*arguments)
        self.seconds += time.process_time() - start
        return result


class Side:
    """A network and its optimizer."""

    def __init__(self, build: Callable[[torch.optim.Optimizer, nn.Module], Any]) -> None:
        self.model = ConvNet()
        base: Any = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
        self.optimizer = build(base, self.model)
        self.evaluation = Timed(self._evaluate)
        self.step = Timed(self.optimizer.step)
        if self.optimizer is not base:
            base.step = self.base_step = Timed(base.step)

    def _evaluate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = WINDOW * options.windows
    print(
        f"torch {torch.__version__}, {options.threads} thread(s), {options.windows} windows of {WINDOW} steps"
    )

    sides = {
        "SGD": Side(lambda base, model: base),
        "SAM": Side(lambda base, model: SAM(base, rho=0.05, model=model)),
        "LookSAM": Side(lambda base, model: LookSAM(base, rho=0.1, model=model)),
        "AE-SAM": Side(lambda base, model: AESAM(base, rho=0.05, total_steps=steps, model=model)),
        "ARSAM": Side(lambda base, model: ARSAM(base, rho=0.05, window=WINDOW, model=model)),
    }
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 64, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (8, 64), generator=generator)
    for side in sides.values():  # what is built once: kernels, buffers
        side.evaluation(inputs[0], labels[0])
        side.evaluation.seconds = 0.0

    means: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.windows):
        before = {name: side.step.seconds for name, side in sides.items()}
        for step in range(WINDOW):
            for side in sides.values():
                batch = inputs[step % 8], labels[step % 8]
                side.step(lambda side=side, batch=batch: side.evaluation(*batch))
        for name, side in sides.items():
            means[name].append((side.step.seconds - before[name]) / WINDOW)

    table = Table()

    def row(name: str, peer: str, target: float | None) -> None:
        """The times' medians, and as the peer's time the one whose ratio is the median of the ratios."""
        ours = statistics.median(means[name])
        ratio = statistics.median(a / b for a, b in zip(means[name], means[peer], strict=True))
        table.row(f"{name} step / {peer} step", ours, ours / ratio, "ms", target)

    row("ARSAM", "SAM", 0.75)
    for name in ("SAM", "LookSAM", "AE-SAM", "ARSAM"):
        row(name, "SGD", None)
    for name in ("LookSAM", "AE-SAM", "ARSAM"):
        optimizer = sides[name].optimizer
        evaluations = optimizer.gradient_evaluations / optimizer.steps
        mine = name == "ARSAM"
        table.row(f"{name} gradient evaluations a step", evaluations, 1.0, "", 1.45 if mine else None)
        if mine:
            table.row(f"{name} gradient evaluations a step", evaluations, 1.0, "", 1.20, True)
    for name in ("SAM", "LookSAM", "AE-SAM", "ARSAM"):
        side = sides[name]
        rest = side.step.seconds - side.evaluation.seconds - side.base_step.seconds
        target = 0.05 if name == "ARSAM" else None
        table.row(f"{name} bookkeeping / step", rest / steps, side.step.seconds / steps, "ms", target)

    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    missed = table.missed
    print("largest difference between weights of SAM and pytorch_optimizer.SAM, 50 steps in float64:")
    for adaptive in (False, True):
        for exact in (False, True):
            found = difference_from_peer(torch.optim.SGD, adaptive, exact_norm=exact, **sgd)
            kind = "the peer's norm in float64" if exact else "the peer as released, its norm in float32"
            verdict = ("<= 1e-10 PASS" if found <= 1e-10 else "<= 1e-10 MISS") if exact else ""
            missed |= verdict.endswith("MISS")
            print(f"  adaptive={adaptive!s:<5} {kind:<43} {found:.1e} {verdict}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
