"""What packing saves: many small trials as one tensor program, against the same trials one after another.

Run: `python tests/bench/bench_packing.py [--threads 1] [--trials 1000] [--alone 30]`. One line a figure:
name, ours, peer, ratio, target, PASS or MISS; exit code 1 if one misses.

One by one means `train` of the same workload in this process, with a run that records nothing: no ledger, no
checkpoint, no process to start. `--alone` trials, evenly spaced among all, are run so after one that is not
measured, and their mean time stands for that of each. The packed side includes the search for what can be
packed and the measurement of the pack; its time is the median of five.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from piste.config import Optimizer, Recipe
from piste.packing import PackSizer, groups, run_pack
from piste.workload import Run
from piste_workloads import mlp, quadratic

LEARNING_RATES = {"sgd": (1e-3, 0.3), "adamw": (1e-3, 0.1), "reg": (1e-3, 0.1)}


class SilentRun(Run):
    """A run that keeps nothing."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rank = 0
        self.world_size = 1
        self.device = torch.device("cpu")
        self._stop = threading.Event()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def report(
        self, metrics: Mapping[str, float], step: int, checkpoint: Mapping[str, Any] | None = None
    ) -> None:
        pass

    def restore(self) -> None:
        return None


def trials_of(base: Recipe, name: str, lrs: Sequence[float], seeds: int) -> tuple[list[Recipe], list[int]]:
    """Every learning rate with every seed."""
    sections = [Optimizer.model_validate({"name": name, "lr": lr}) for lr in lrs]
    configs = [base.model_copy(update={"optimizer": section}) for section in sections for _ in range(seeds)]
    return configs, list(range(seeds)) * len(sections)


def seconds_of(call: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def packed(workload: Any, configs: list[Recipe], seeds: list[int]) -> float:
    """Seconds of all trials as one pack."""

    def call() -> None:
        packs, alone = groups(workload, configs)
        assert (len(packs), len(alone)) == (1, 0)
        run_pack(workload, configs, seeds)

    return seconds_of(call)


def one_by_one(workload: Any, configs: list[Recipe], seeds: list[int], sample: int) -> float:
    """Seconds of all trials alone, from a sample of them."""
    chosen = np.linspace(0, len(configs) - 1, sample).round().astype(int)
    workload.train(configs[0], SilentRun(seeds[0]))
    start = time.perf_counter()
    for index in chosen:
        workload.train(configs[index], SilentRun(seeds[index]))
    return (time.perf_counter() - start) / sample * len(configs)


class Table:
    def __init__(self) -> None:
        self.missed = False
        print(f"{'figure':<62} {'ours':>15} {'peer':>15} {'ratio':>8} {'target':>9}")

    def row(self, name: str, ours: str, peer: str, ratio: float | None, judged: float, target: float) -> None:
        """One figure: `judged` is at least `target`."""
        passed = judged >= target
        self.missed |= not passed
        shown = "" if ratio is None else f"{ratio:.1f}"
        verdict = "PASS" if passed else "MISS"
        print(f"{name:<62} {ours:>15} {peer:>15} {shown:>8} {f'>= {target:g}':>9} {verdict}", flush=True)


def sizes(workload: Any, configs: list[Recipe], seeds: list[int]) -> list[tuple[int, float]]:
    """The packs that a `PackSizer` makes of trials: how many each has, and microseconds a trial."""
    sizer, found, start = PackSizer(), [], 0
    while start < len(configs):
        end = start + sizer.size
        measured = run_pack(workload, configs[start:end], seeds[start:end]).measured
        sizer.learn(measured)
        found += [(each.trials, 1e6 * each.seconds / each.trials) for each in measured]
        start = end
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=30)
    options = parser.parse_args()
    base = mlp.Config().model_copy(
        update={"resources": mlp.Config().resources.model_copy(update={"cpus_per_worker": options.threads})}
    )
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s)")
    table = Table()

    seeds_each = 50
    for name, (low, high) in LEARNING_RATES.items():
        lrs = np.geomspace(low, high, options.trials // seeds_each).tolist()
        configs, seeds = trials_of(base, name, lrs, seeds_each)
        ours = packed(mlp, configs, seeds)
        peer = one_by_one(mlp, configs, seeds, options.alone)
        label = f"{len(configs)} MLP trials ({len(lrs)} lr x {seeds_each} seeds, 100 steps), {name}"
        table.row(label, f"{ours:.2f} s", f"{peer:.1f} s", peer / ours, peer / ours, 20)

    small = quadratic.Config().model_copy(update={"resources": base.resources})
    for count, seeds_each in ((4096, 1), (1024, 4)):
        lrs = np.linspace(0.05, 1.95, count).tolist()
        configs, seeds = trials_of(small, "sgd", lrs, seeds_each)
        ours = len(configs) / packed(quadratic, configs, seeds)
        peer = len(configs) / one_by_one(quadratic, configs, seeds, options.alone)
        label = f"quadratic: {count} lr x {seeds_each} seed(s), 100 steps of sgd"
        table.row(label, f"{ours:.0f} trials/s", f"{peer:.0f} trials/s", ours / peer, ours, 20_000)

    for workload, base_config, name, (low, high), count in (
        (mlp, base, "adamw", LEARNING_RATES["adamw"], 8 * options.trials),
        (quadratic, small, "sgd", (0.05, 1.95), 100 * options.trials),
    ):
        configs, seeds = trials_of(base_config, name, np.geomspace(low, high, count).tolist(), 1)
        packs = ", ".join(f"{trials} ({each:.0f} us)" for trials, each in sizes(workload, configs, seeds)[:7])
        print(f"first packs of {count} {workload.__name__.rpartition('.')[2]} trials (time a trial): {packs}")
    return int(table.missed)


if __name__ == "__main__":
    sys.exit(main())
