"""What one of two data-parallel processes does: a run of the workload `images`, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import all_reduce, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from piste_workloads import images
from piste_workloads.images.config import Config

CONFIG = Config.model_validate(
    {
        "model": {"name": "conv", "width": 2},
        "data": {"name": "digits", "samples": 65},
        "augmentation": {"crop": 1, "flip": True, "cutout": 2},
        "optimizer": {"name": "arsam", "base": {"name": "sgd", "lr": 0.1, "momentum": 0.9}},
        "train": {"epochs": 3, "batch": 24, "accumulate": 2, "evaluation_batch": 3, "sharpness_examples": 10},
        "resources": {"workers": 2},
    }
)


class Worker:
    """As a `Run` of two workers, which keeps in memory what it is told."""

    def __init__(self, rank: int) -> None:
        self.seed, self.rank, self.world_size = 0, rank, 2
        self.device = torch.device("cpu")
        self.should_stop = False
        self.metrics: dict[str, list[float]] = {}
        self.checkpoint: Any = None

    def prepare(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)

    def shard(self, items: list[int]) -> list[int]:
        return items[self.rank :: 2]

    def mean(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64)
        all_reduce(total)
        return float(total) / 2

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


def work(rank: int, folder: Path) -> None:
    """Train, and save what the test compares."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # global generators differ between ranks
    init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    worker: Any = Worker(rank)
    images.train(CONFIG, worker)
    torch.save({"metrics": worker.metrics, "model": worker.checkpoint["model"]}, folder / f"rank{rank}.pt")
    destroy_process_group()
