"""What whitening costs next to torch's singular value decomposition, its error, and the cost of EGD's step.

Run: `python tests/bench/bench_egd.py [--threads 1] [--repeats 15]`. One line a figure: name, ours, peer,
ratio, target, PASS or MISS; exit code 1 if one misses. The sides of a comparison alternate in one process,
each once unmeasured and once measured a round, and medians of processor time (all threads) are compared, so
that other work on the machine counts for little. The matrix is a gradient of the hidden layer of modular
addition, p = 97, with 512 units (a batch of 512 pairs), as the published experiment has it.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable

import scipy.linalg
import torch
from torch import Tensor, nn

from piste_algorithms.optimizers import EGD, whiten

MODULUS, UNITS, BATCH = 97, 512, 512


def medians(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of processor time of each side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            call()
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


class Table:
    def __init__(self) -> None:
        self.missed = False
        print(f"{'figure':<62} {'ours':>12} {'peer':>12} {'ratio':>6} {'target':>9}")

    def time(self, name: str, ours: float, peer: float, target: float | None = None) -> None:
        """Two times in seconds, whose ratio is at most `target`; no target, no verdict."""
        self._row(
            name, f"{ours * 1e3:.3f} ms", f"{peer * 1e3:.3f} ms", f"{ours / peer:.3f}", ours / peer, target
        )

    def number(self, name: str, value: float, target: float | None = None) -> None:
        """A number that is at most `target`."""
        self._row(name, f"{value:.2e}", "", "", value, target)

    def _row(self, name: str, ours: str, peer: str, ratio: str, judged: float, target: float | None) -> None:
        verdict = ""
        if target is not None:
            self.missed |= not judged <= target
            verdict = f"{f'<= {target:g}':>9} {'PASS' if judged <= target else 'MISS'}"
        print(f"{name:<62} {ours:>12} {peer:>12} {ratio:>6} {verdict}", flush=True)


def network() -> tuple[nn.Module, Callable[[], Tensor]]:
    """Modular addition: the network after its published initialisation, and the loss of a batch."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(2 * MODULUS, UNITS), nn.ReLU(), nn.Linear(UNITS, MODULUS, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            scale = (2 / parameter.shape[1]) ** 0.5 if parameter.ndim == 2 else 0.0
            parameter.normal_(0.0, 1.0, generator=generator).mul_(scale)
    pairs = torch.randint(0, MODULUS, (BATCH, 2), generator=generator)
    inputs = nn.functional.one_hot(pairs, MODULUS).flatten(1).float()
    targets = pairs.sum(1) % MODULUS
    return model, lambda: nn.functional.cross_entropy(model(inputs), targets)


def backward(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    model.zero_grad()
    loss().backward()  # type: ignore[no-untyped-call]


def by_svd(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    product: Tensor = u @ vh
    return product


def relative_error(matrix: Tensor, method: str) -> float:
    polar = torch.from_numpy(scipy.linalg.polar(matrix.double().numpy())[0])
    return float((whiten(matrix, method).double() - polar).norm() / polar.norm())


def conditioned(m: int, n: int, condition: float) -> Tensor:
    """A float32 matrix with singular values spaced evenly in the logarithm."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(k, m, dtype=torch.float64, generator=generator)).Q for k in (m, n))
    values = condition ** -torch.linspace(0, 1, m, dtype=torch.float64)
    product: Tensor = (u * values) @ v.mT
    return product.float()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), medians of {options.repeats}")
    table = Table()

    model, loss = network()
    backward(model, loss)
    hidden = next(model.parameters())
    assert hidden.grad is not None
    wide = hidden.grad.mT.contiguous()
    found = medians(
        {
            "eigh": functools.partial(whiten, wide),
            "torch": functools.partial(by_svd, wide),
            "torch, full": functools.partial(torch.linalg.svd, wide),
            "tall": functools.partial(whiten, hidden.grad),
            "torch, tall": functools.partial(by_svd, hidden.grad),
        },
        options.repeats,
    )
    table.time("eigh / U V^T by thin torch.linalg.svd, 194x512", found["eigh"], found["torch"], 0.5)
    table.time("eigh / torch.linalg.svd as it is by default, 194x512", found["eigh"], found["torch, full"])
    table.time("eigh / U V^T by thin torch.linalg.svd, 512x194", found["tall"], found["torch, tall"])
    sides: dict[str, Callable[[], object]] = {"torch": functools.partial(by_svd, wide)}
    for method, rank in (
        ("svd", None),
        ("rsvd", 128),
        ("rsvd", 64),
        ("newton_schulz", None),
        ("colnorm", None),
    ):
        name = method if rank is None else f"{method}, rank {rank}"
        sides[name] = functools.partial(whiten, wide, method, rank)
    found = medians(sides, options.repeats)
    for name in list(sides)[1:]:
        table.time(f"{name} / U V^T by thin torch.linalg.svd, 194x512", found[name], found["torch"])

    for condition in (1e1, 1e2, 1e3):
        matrix = conditioned(194, 512, condition)
        name = f"eigh, error to scipy.linalg.polar, condition {condition:g}, float32"
        table.number(name, relative_error(matrix, "eigh"), 1e-5)
    for condition in (1e4, 1e5, 1e6):
        matrix = conditioned(194, 512, condition)
        table.number(f"  condition {condition:g}", relative_error(matrix, "eigh"))
    for method in ("svd", "newton_schulz"):
        table.number(
            f"{method}, the same at condition 1000", relative_error(conditioned(194, 512, 1e3), method)
        )

    sgd = torch.optim.SGD(model.named_parameters(), lr=0.0, weight_decay=1e-4)
    egd = EGD(sgd, select=r"^0\.")
    found = medians(
        {
            "gradient": lambda: backward(model, loss),
            "sgd": sgd.step,
            "egd": egd.step,
        },
        options.repeats,
    )
    iteration = found["gradient"] + found["egd"]
    table.time("EGD's step / EGD's iteration, modular addition, batch 512", found["egd"], iteration)
    table.time("EGD's iteration / SGD's", iteration, found["gradient"] + found["sgd"])
    matrix_time = medians({"whiten": functools.partial(whiten, hidden.grad)}, options.repeats)["whiten"]
    table.time("EGD's step / whitening and SGD's step", found["egd"], matrix_time + found["sgd"])
    return int(table.missed)


if __name__ == "__main__":
    sys.exit(main())
