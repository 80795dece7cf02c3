"""The fixture that runs workloads in this process."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.workloads.local_runs import LocalRun, RunOf

from piste.config import Recipe, Tracking
from piste.ledger import Ledger


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors: several threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def run_of(tmp_path: Path) -> RunOf:
    """Runs a workload: `run_of(module, config, stop_after=0)`."""
    count = 0

    def start(workload: ModuleType, config: Recipe, stop_after: int = 0) -> LocalRun:
        nonlocal count
        count += 1
        directory = tmp_path / f"run-{count}"
        config = config.model_copy(update={"tracking": Tracking(system_metrics=False)})
        ledger = Ledger(f"sqlite:///{directory / 'ledger.db'}")
        columns: dict[str, Any] = {"recipe": "test", "workload": config.workload, "seed": config.seed}
        columns |= {"config": {}, "provenance": {}, "identity": "", "cell": "", "directory": str(directory)}
        ledger.create(id="run", **columns)
        return LocalRun(workload, config, directory, ledger).attempt(stop_after)

    return start
