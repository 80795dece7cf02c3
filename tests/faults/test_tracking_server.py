"""An MLflow server that stalls, is killed and comes back: training does not notice, and all is shown once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.faults.disturbed import (
    HELD,
    STEPS,
    assert_same_trials,
    assert_whole,
    start_run,
    start_sweep,
    wait_for_step,
)
from tests.platform.driving import (
    end,
    end_server,
    free_port,
    ledger_of,
    start_piste,
    start_server,
    steps_taken,
    wait_until,
)

pytest_plugins = ["tests.platform.fixtures"]
pytestmark = pytest.mark.fault


def found(store: Path, filter: str) -> list[Any]:
    """The runs that an MLflow store has of a filter."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, filter, max_results=1000))


def shown_steps(store: Path, run_id: str) -> Counter[int]:
    """How often each step of the loss is in MLflow."""
    from mlflow import MlflowClient

    [run] = found(store, f"tags.`piste.run_id` = '{run_id}'")
    history = MlflowClient(tracking_uri=f"sqlite:///{store}").get_metric_history(
        run.info.run_id, "train/loss"
    )
    return Counter(metric.step for metric in history)


def stall(server: subprocess.Popen[bytes], seconds: float) -> None:
    """Stops a server and all of its processes for a while."""
    os.killpg(server.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until(lambda: time.monotonic() > stopped + seconds, "the stall is over")
    os.killpg(server.pid, signal.SIGCONT)


def test_a_run_on_ray_whose_server_stalls_dies_and_comes_back(
    two: tuple[Path, str], shown_home: Path, tmp_path: Path
) -> None:
    folder, store, port = tmp_path / "records", shown_home / "mlflow.db", free_port()
    server = start_server(store, port)
    try:
        process = start_run(shown_home, folder, "--tracking.uri", f"http://127.0.0.1:{port}")
        [row] = ledger_of(shown_home).runs()
        stall(server, 10.0)
        end_server(server)
        (folder / "go").touch()
        # The run goes to its end while nobody shows it.
        wait_until(lambda: all(steps_taken(folder, r)[-1][0] == STEPS for r in (0, 1)), "the last step", 60.0)
        server = start_server(store, port)
        code, out, err = end(process)
        assert code == 0, err
        assert '"status": "finished"' in out
        assert ledger_of(shown_home).run(row.id).attempt == 1
        code, out, err = end(start_piste(shown_home, "sync"))  # a slow server may have left some to push
        assert (code, out) == (0, "1 runs and sweeps in step with MLflow, 0 rows pending\n"), err
    finally:
        end_server(server)
    assert shown_steps(store, row.id) == Counter(range(1, STEPS + 1))
    assert_whole(shown_home, row.id, two, folder)


def test_a_sweep_whose_server_was_killed_loses_nothing(shown_home: Path, tmp_path: Path) -> None:
    folder, store, port = tmp_path / "records", shown_home / "mlflow.db", free_port()
    server = start_server(store, port)
    try:
        process = start_sweep(shown_home, folder, "--local", "--tracking.uri", f"http://127.0.0.1:{port}")
        wait_for_step(process, folder, HELD)
    finally:
        end_server(server)
    (folder / "go").touch()
    code, out, err = end(process)
    assert code == 0, err
    assert '"status": "finished"' in out
    assert "piste sync" in err
    [row] = ledger_of(shown_home).sweeps.newest()
    server = start_server(store, port)
    try:
        code, out, err = end(start_piste(shown_home, "sync"))
        assert (code, out) == (0, "1 runs and sweeps in step with MLflow, 0 rows pending\n"), err
    finally:
        end_server(server)
    trials = [
        run for run in found(store, f"tags.`piste.sweep_id` = '{row.id}'") if "piste.trial" in run.data.tags
    ]
    shown = [(int(run.data.tags["piste.trial"]), run.data.metrics.get("train/loss")) for run in trials]
    assert sorted(shown) == [(t.number, t.value) for t in ledger_of(shown_home).sweeps.trials(row.id)]
    assert_same_trials(shown_home, row.id, folder)
