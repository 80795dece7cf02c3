"""Runs of workloads in this process, with a ledger of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from piste.config import Recipe
from piste.ledger import Ledger
from piste.workload import Run, local_run


class StoppingRun(Run):
    """A run that is asked to end once it has logged `train/loss` of a step."""

    stop_after = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        super().log(metrics, step)
        if step == self.stop_after:
            self.stop()


@dataclass
class LocalRun:
    """A workload's run that has ended."""

    workload: ModuleType
    config: Recipe
    directory: Path
    ledger: Ledger

    def attempt(self, stop_after: int = 0) -> LocalRun:
        """Runs the next attempt."""
        run = local_run("run", self.config, self.directory, self.ledger)
        run.__class__ = StoppingRun
        run.stop_after = stop_after  # type: ignore[attr-defined]
        try:
            self.workload.train(self.config, run)
        finally:
            run.close()
        return self

    def resume(self) -> LocalRun:
        """Continues the run."""
        return self.attempt()

    def history(self, key: str) -> list[tuple[int, float]]:
        """All values of a metric as `(step, value)`."""
        return self.ledger.history("run", key)

    def recomputed(self) -> int:
        """How many numbers came out otherwise when they were computed again."""
        return self.ledger.run("run").recomputed_different


class RunOf(Protocol):
    """Runs a workload, from its start to its end or until it has logged step `stop_after`."""

    def __call__(self, workload: ModuleType, config: Recipe, stop_after: int = 0) -> LocalRun:
        """The run, ended."""
