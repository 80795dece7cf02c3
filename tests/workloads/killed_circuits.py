"""The workload `circuits`, of which rank 1 is killed once: behind the checkpoint of the second epoch."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from piste.workload import Run
from piste_workloads import circuits


class Config(circuits.Config, frozen=True):
    """A recipe of circuits with a file that is there once the worker was killed."""

    workload: str = "tests.workloads.killed_circuits"
    killed: Path


def train(config: Config, run: Run) -> None:
    report = run.report

    def then_die(metrics: Mapping[str, float], step: int, checkpoint: Any = None) -> None:
        report(metrics, step, checkpoint)
        if run.rank == 1 and step == 2 and checkpoint is not None and not config.killed.exists():
            config.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    run.report = then_die  # type: ignore[method-assign]
    circuits.train(config, run)
