"""Ray's own calls fail, as often as its injection variable says: what comes of a run and a sweep is the same.

The calls that carry piste's messages are named and their failures bounded: with all calls failing without
bound Ray itself does not start.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.faults.disturbed import assert_same_trials, assert_whole, start_sweep
from tests.platform.driving import end, ledger_of, paced_recipe, start_piste

pytest_plugins = ["tests.platform.fixtures"]
pytestmark = pytest.mark.fault


@pytest.fixture
def failing_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every process of Ray's, three tasks or their answers are lost, half of the time each."""
    bound = {"num_failures": 3, "req_failure_prob": 50, "resp_failure_prob": 50}
    monkeypatch.setenv(
        "RAY_testing_rpc_failure", json.dumps({"CoreWorkerService.grpc_client.PushTask": bound})
    )


@pytest.mark.usefixtures("failing_calls")
def test_a_run_is_the_same(two: tuple[Path, str], shown_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    recipe = paced_recipe(folder, "workers = 2")
    code, out, err = end(start_piste(shown_home, "run", recipe, "--json"))
    assert code == 0, err
    assert '"status": "finished"' in out
    [row] = ledger_of(shown_home).runs()
    assert_whole(shown_home, row.id, two, folder, again=10 * row.attempt)


@pytest.mark.usefixtures("failing_calls")
def test_a_sweep_has_the_same_trials(shown_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "go").touch()
    # Tune takes a lost call for a process that has died, and all of them may be one trial's.
    code, out, err = end(start_sweep(shown_home, folder, "--sweep.retries.died", "3"))
    assert code == 0, err
    assert '"status": "finished"' in out
    [row] = ledger_of(shown_home).sweeps.newest()
    assert_same_trials(shown_home, row.id, folder)
