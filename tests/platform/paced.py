"""A workload for tests: its steps can wait on a file, so that a kill lands where the test wants it.

Least squares to drawn points, with noise of the global generator, so that a resume that forgets the
state of the generators, of the optimizer or of the data's order comes out otherwise. Every rank adds
a line `step pid` to `records/rank-N.txt` before it takes a step.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from piste.building import build_optimizer
from piste.checkpoints import load
from piste.config import Checkpoints, Optimizer, Recipe, Section
from piste.workload import Run

BATCH, DIMENSION = 8, 5
FAILURE = "the laboratory is on fire"


class Pace(Section):
    """`[pace]`: what happens at which step; step 0 never comes."""

    steps: int = Field(default=20, ge=1)
    records: Path | None = None
    hold_at: int = Field(default=0, description="wait for the file `go` among the records")
    fail_at: int = Field(default=0, description="raise, unless the file `mended` is among the records")
    fail_rank: int = 0
    deaf: bool = Field(default=False, description="go on waiting where the run was asked to stop")
    nan_at: int = Field(default=0, description="log a metric that is not a number")


class Config(Recipe, frozen=True):
    """Everything that a run of this workload is told."""

    workload: str = "tests.platform.paced"
    optimizer: Optimizer = Optimizer.model_validate({"name": "sgd", "lr": 0.1, "momentum": 0.9})
    checkpoints: Checkpoints = Checkpoints(every=5)
    pace: Pace = Pace()

    @property
    def total_steps(self) -> int:
        return self.pace.steps


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(DIMENSION, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        loss: Tensor = ((self.x - rows) ** 2).mean()
        return loss


def train(config: Config, run: Run) -> None:
    model = Point()
    optimizer = build_optimizer(config.optimizer, model)
    network = run.prepare(model)
    start = run.resume(model, optimizer)
    for step in range(start + 1, config.pace.steps + 1):
        _pace(config.pace, run, step)
        loss = run.mean(_step(network, optimizer, run, step))
        run.log({"train/loss": loss}, step)
        if step == config.pace.nan_at:
            run.log({"aux/broken": float("nan")}, step)
        stop = run.mean(float(run.should_stop)) > 0.0
        if stop or config.checkpoints.due(step, config.pace.steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            run.report({"train/loss": loss}, step, checkpoint=state)
        if stop:
            return


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, run: Run, step: int) -> float:
    generator = torch.Generator().manual_seed(1_000_003 * run.seed + step)
    rows = torch.randn(BATCH, DIMENSION, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(DIMENSION, dtype=torch.float64)
    mine = rows[list(run.shard(range(BATCH)))] + noise

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = network(mine)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return float(optimizer.step(closure))  # type: ignore[arg-type]


def _pace(pace: Pace, run: Run, step: int) -> None:
    if pace.records is None:
        return
    with (pace.records / f"rank-{run.rank}.txt").open("a") as file:
        file.write(f"{step} {os.getpid()}\n")
    if step == pace.fail_at and run.rank == pace.fail_rank and not (pace.records / "mended").exists():
        raise RuntimeError(FAILURE)
    go = pace.records / "go"
    held = step == pace.hold_at and run.rank == 0  # the others wait for it in their collective
    while held and not go.exists() and (pace.deaf or not run.should_stop):
        time.sleep(0.01)


def where(config: Config, checkpoint: Path, scale: float = 1.0) -> list[float]:
    """The point that a run has come to."""
    x: Tensor = load(checkpoint)["model"]["x"]
    return [scale * float(value) for value in x]


verbs = {"where": where}
