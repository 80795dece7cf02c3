"""A truncated checkpoint: the run falls back to the one before, says so, and ends as if nothing had been."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.faults.disturbed import (
    EVERY,
    HELD,
    STEPS,
    assert_whole,
    resumed,
    start_run,
    wait_for_step,
    workers_of,
)
from tests.platform.driving import (
    alive,
    assert_same_weights,
    done_again,
    end,
    ledger_of,
    paced_recipe,
    start_piste,
    steps_taken,
    wait_until,
)

import piste

pytest_plugins = ["tests.platform.fixtures"]

SAID = (
    "checkpoint step-000000010 is damaged (rank-0.pt has changed since it was written): "
    "falling back to checkpoint step-000000005"
)


def truncate(directory: str) -> None:
    """Cuts the newest checkpoint of a run, as a host that loses power would."""
    path = Path(directory) / "checkpoints" / "step-000000010" / "rank-0.pt"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.fault
def test_a_resume_falls_back_and_says_so(shown_home: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder = tmp_path / "records"
    process = start_piste(shown_home, "run", paced_recipe(folder, hold_at=HELD), "--local", "--json")
    wait_for_step(process, folder)
    process.send_signal(signal.SIGKILL)
    end(process)
    [row] = ledger_of(shown_home).runs()
    truncate(row.directory)
    (folder / "go").touch()
    assert SAID in resumed(shown_home, row.id, "--local")
    assert [step for step, _ in steps_taken(folder)] == [*range(1, HELD + 1), *range(EVERY + 1, STEPS + 1)]
    # Also where the run is shown.
    client = MlflowClient(tracking_uri=f"sqlite:///{shown_home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("piste")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    log = client.download_artifacts(run.info.run_id, "log.txt", str(tmp_path))
    assert [line.partition(" checkpoint")[2] for line in Path(log).read_text().splitlines()] == [
        SAID.removeprefix("checkpoint")
    ]
    whole = piste.run(paced_recipe(tmp_path / "other"), local=True)
    ledger = ledger_of(shown_home)
    assert ledger.history(row.id, "train/loss") == whole.history("train/loss")
    assert ledger.run(row.id).recomputed_different == 0
    assert_same_weights(Path(row.directory), whole.directory)


@pytest.mark.fault
def test_workers_on_ray_fall_back_and_the_command_says_so(
    two: tuple[Path, str], shown_home: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "records"
    process = start_run(shown_home, folder)
    workers = workers_of(folder)
    process.send_signal(signal.SIGKILL)
    end(process)
    wait_until(lambda: not alive(workers), "the end of the workers, which would go on", 60.0)
    [row] = ledger_of(shown_home).runs()
    truncate(row.directory)
    (folder / "go").touch()
    err = resumed(shown_home, row.id)
    assert err.count(SAID) == 1  # once, not once a rank
    assert [done_again(folder, rank) for rank in (0, 1)] == [HELD - EVERY, HELD - EVERY]
    assert [a.name for a in ledger_of(shown_home).artifacts(row.id) if a.kind == "log"] == ["log.txt"]
    assert_whole(shown_home, row.id, two, folder, again=HELD - EVERY)
