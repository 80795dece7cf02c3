"""What one of two data-parallel processes does: a run of the workload `circuits`, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_reduce, destroy_process_group, init_process_group

from piste.config import validate
from piste_workloads import circuits
from piste_workloads.circuits.config import Config


def config_of(text: Path, workers: int, rule: str) -> Config:
    """Batches that two workers share unevenly, and a last one of a single row, which only one of them has."""
    table = {
        "data": {"kind": "text", "source": "file", "path": str(text), "length": 8, "rows": 101},
        "model": {"name": "hmm", "latents": 4},
        "rule": {"name": rule},
        "train": {"epochs": 3, "batch": 25, "samples": 0},
        "resources": {"workers": workers},
    }
    return validate(Config, table, "test")


class Worker:
    """As a `Run` of some workers, which keeps in memory what it is told."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.seed, self.rank, self.world_size = 0, rank, world_size
        self.device = torch.device("cpu")
        self.should_stop = False
        self.metrics: dict[str, list[float]] = {}
        self.checkpoint: Any = None

    def shard(self, items: Tensor) -> Tensor:
        return items[self.rank :: self.world_size]

    def mean(self, value: float) -> float:
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        all_reduce(total)
        return float(total) / self.world_size

    def restore(self) -> None:
        """There is no checkpoint."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.metrics.setdefault(key, []).append(value)

    def report(self, metrics: dict[str, float], step: int, checkpoint: Any = None) -> None:
        self.log(metrics, step)
        self.checkpoint = checkpoint or self.checkpoint

    def figure(self, *_: object) -> None:
        """Pictures are not kept."""

    def table(self, *_: object) -> None:
        """Tables neither."""


def train(config: Config, rank: int = 0) -> dict[str, Any]:
    """A run's metrics and the tables of its last checkpoint."""
    worker: Any = Worker(rank, config.resources.workers)
    circuits.train(config, worker)
    return {"metrics": worker.metrics, "model": worker.checkpoint["model"]}


def work(rank: int, folder: Path, text: Path, rules: list[str]) -> None:
    """Trains with one rule after the other, and saves what the test compares."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # global generators differ between ranks
    init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    found = {rule: train(config_of(text, 2, rule), rank) for rule in rules}
    torch.save(found, folder / f"rank{rank}.pt")
    destroy_process_group()
