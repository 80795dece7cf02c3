"""What a `Run` does by itself, in this process."""

from pathlib import Path

import pytest

from piste.config import Recipe
from piste.ledger import Ledger
from piste.workload import _SystemSampler, local_run


def test_system_metrics_of_a_second_attempt_are_kept_beside_the_firsts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    columns = {"recipe": "r", "workload": "w", "seed": 0, "config": {}, "provenance": {}}
    ledger.create(id="run", identity="", cell="", directory=str(tmp_path), **columns)
    monkeypatch.setattr(_SystemSampler, "period", 0.0)
    created, clock = ledger.run("run").created, [0.0]
    monkeypatch.setattr("piste.workload.time.time", lambda: created + clock[0])
    for clock[0] in (10.0, 70.0):  # seconds after the run's creation at which an attempt samples
        run = local_run("run", Recipe(workload="w"), tmp_path, ledger)
        run.log({"train/loss": 1.0}, int(clock[0]))
        assert run._buffer is not None
        sample = run._buffer._sample
        assert sample is not None
        metrics, step = sample()
        run.log(metrics, step)
        run.close()
    steps = [step for step, _ in ledger.history("run", "system/host_memory_percent")]
    assert steps == [10, 70]
