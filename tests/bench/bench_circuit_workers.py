"""Two workers that sum their flows, against two processes that learn each for itself.

    python tests/bench/bench_circuit_workers.py [--steps 20]

One thread a process. The workers share every batch of 4,096 rows and make the same update (gloo, as Ray
Train has it on processors); the peers take batches of 4,096 rows each and know nothing of one another. Both
pairs are started once and take turns, so that they meet the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from piste_algorithms.circuits import Anemone, hmm
from piste_workloads.circuits.train import sum_over_workers

BATCH, LENGTH, STATES, LETTERS, ROUNDS, TARGET = 4096, 32, 64, 27, 5, 0.8


def work(rank: int, together: bool, store: str, steps: int, turn: Any, rates: Any) -> None:
    """One process of a pair: rows a second in each of its turns."""
    torch.set_num_threads(1)
    if together:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows = BATCH // 2 if together else BATCH
    batch = torch.randint(LETTERS, (rows, LENGTH), generator=torch.Generator().manual_seed(rank))
    rule = Anemone(hmm(LENGTH, STATES, LETTERS, generator=torch.Generator().manual_seed(0)))

    def take(number: int) -> None:
        for _ in range(number):
            rule.accumulate(batch)
            if together:
                sum_over_workers(list(rule.accumulated().values()))
            rule.update()

    take(1)
    for number in range(2 * ROUNDS):
        turn.wait()
        if (number % 2 == 0) is together:
            began = time.perf_counter()
            take(steps)
            rates.append((together, number, rows * steps / (time.perf_counter() - began)))
    turn.wait()
    if together:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    steps = parser.parse_args().steps
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Manager() as manager:
        rates, turn = manager.list(), context.Barrier(4)
        processes = [
            context.Process(target=work, args=(rank, together, f"{folder}/store", steps, turn, rates))
            for together in (True, False)
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found = list(rates)
    # Both processes of a pair add up, turn by turn.
    ours, peers = (
        statistics.median(
            sum(rate for pair, at, rate in found if at == number and pair is together)
            for number in {at for pair, at, _ in found if pair is together}
        )
        for together in (True, False)
    )
    verdict = "PASS" if ours / peers >= TARGET else "MISS"
    print(f"rows/s of two workers {ours:,.0f}, of two processes {peers:,.0f}", end="   ")
    print(f"ratio {ours / peers:.2f}   # target {TARGET}: {verdict}")
    sys.exit(verdict == "MISS")


if __name__ == "__main__":
    main()
