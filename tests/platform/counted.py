"""A workload whose numbers are known beforehand: after step n the state is `state(n)`.

It adds up, so that a step that is left out or taken twice shows in all that follow.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from tests.platform.simulated import current

from piste.config import Checkpoints, Optimizer, Recipe, Section
from piste.errors import PisteError
from piste.workload import Run

KEYS = ("sum", "noise", "time/clock")


class Count(Section):
    """`[count]`: how far."""

    steps: int = Field(default=6, ge=1)


class Config(Recipe, frozen=True):
    """Everything that a run of this workload is told; one of an odd seed has noise that no resume repeats."""

    workload: str = "tests.platform.counted"
    optimizer: Optimizer = Optimizer.model_validate({"name": "sgd", "lr": 0.1})
    checkpoints: Checkpoints = Checkpoints(every=2)
    count: Count = Count()

    @property
    def total_steps(self) -> int:
        return self.count.steps


class Stumbled(PisteError):
    """The workload fails on its own account."""


def state(step: int) -> int:
    """The state after a step."""
    return step * (step + 1) // 2


def train(config: Config, run: Run) -> None:
    task = current()
    assert task is not None
    process = task.process
    expected = process.world.whole_checkpoint(run.directory)
    found = run.restore()
    begun = 0 if found is None else int(found["step"])
    process.world.expect(begun == expected, f"resumed from {begun}, not from {expected}")
    total = torch.tensor(0) if found is None else found["total"]
    for step in range(begun + 1, config.count.steps + 1):
        task.pause()
        if process.stumbles:
            raise Stumbled(f"it stumbled at step {step}")
        total = total + step
        run.log({"sum": float(total), "time/clock": process.world.now}, step)
        noise = math.inf if step == 3 else process.pid * (config.seed % 2)
        run.log({"noise": noise}, step)
        stop = run.should_stop
        if stop or config.checkpoints.due(step, config.count.steps):
            run.table("state", [{"step": step, "total": int(total)}], step)
            run.report({}, step, checkpoint={"total": total})
        if stop:
            return
