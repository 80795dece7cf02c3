"""SIGKILL of drivers and of the ledger's writer, and Ctrl-C: the end is that of what nothing disturbs."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from tests.faults.disturbed import (
    HELD,
    assert_same_trials,
    assert_whole,
    resumed,
    start_run,
    start_sweep,
    wait_for_step,
    writers_of,
)
from tests.platform.driving import alive, descendants, end, ledger_of, start_piste, steps_taken, wait_until

from piste.checkpoints import CheckpointStore

pytest_plugins = ["tests.platform.fixtures"]
pytestmark = pytest.mark.fault


def test_a_run_whose_driver_was_killed_goes_on_from_its_checkpoint(
    two: tuple[Path, str], shown_home: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "records"
    process = start_run(shown_home, folder)
    children = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    assert end(process)[0] == -signal.SIGKILL
    [row] = ledger_of(shown_home).runs()
    assert row.status == "running"  # nobody was left to say otherwise
    assert CheckpointStore(Path(row.directory) / "checkpoints").steps() == [5, 10]
    (folder / "go").touch()
    resumed(shown_home, row.id)
    assert_whole(shown_home, row.id, two, folder)
    # Ray's agents notice after a minute that their raylet is gone.
    wait_until(lambda: not alive(children), "the end of all processes", 120.0)


def test_ctrl_c_ends_a_run_on_ray_at_once_and_leaves_nothing_behind(
    two: tuple[Path, str], shown_home: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "records"
    process = start_run(shown_home, folder)
    children = descendants(process.pid)
    workers = {pid for rank in (0, 1) for _, pid in steps_taken(folder, rank)}
    assert workers <= {child.pid for child in children}
    pressed = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    seconds = time.monotonic() - pressed
    [row] = ledger_of(shown_home).runs()
    assert code == 130, err
    assert row.status == "interrupted"
    assert f"piste resume {row.id}" in err
    assert "Traceback" not in err
    assert seconds < 5.0
    relays = [child for child in children if any("piste.relay_process" in line for line in alive([child]))]
    wait_until(lambda: not alive([child for child in children if child not in relays]), "Ray's end", 10.0)
    wait_until(lambda: not alive(relays), "the end of the relay, which drains by itself", 60.0)
    (folder / "go").touch()
    resumed(shown_home, row.id)
    assert_whole(shown_home, row.id, two, folder)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_whose_driver_was_ended_resumes_to_the_same_trials(
    shown_home: Path, tmp_path: Path, how: signal.Signals
) -> None:
    folder = tmp_path / "records"
    process = start_sweep(shown_home, folder)
    wait_for_step(process, folder)
    children = descendants(process.pid)
    pressed = time.monotonic()
    process.send_signal(how)
    code, _, err = end(process)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL), err
    assert "Traceback" not in err
    [row] = ledger_of(shown_home).sweeps.newest()
    if how == signal.SIGINT:
        assert time.monotonic() - pressed < 5.0
        assert f"piste sweep --resume {row.id}" in err
        assert row.status == "interrupted"
    (folder / "go").touch()
    code, out, err = end(start_piste(shown_home, "sweep", "--resume", row.id, "--json"))
    assert code == 0, err
    assert '"status": "finished"' in out
    assert_same_trials(shown_home, row.id, folder)
    # Ray's agents notice after a minute that their raylet is gone.
    wait_until(lambda: not alive(children), "the end of all processes", 120.0)


def test_a_run_outlives_its_ledger_s_writer(two: tuple[Path, str], shown_home: Path, tmp_path: Path) -> None:
    """The writer dies while rank 0 has rows that it has not acknowledged; nobody has to resume."""
    folder = tmp_path / "records"
    process = start_run(shown_home, folder)
    children = descendants(process.pid)
    [killed] = writers_of(process)
    killed.kill()
    (folder / "go").touch()
    code, out, err = end(process)
    assert code == 0, err
    assert '"status": "finished"' in out
    [row] = ledger_of(shown_home).runs()
    assert row.attempt == 1  # no worker had to be replaced
    assert_whole(shown_home, row.id, two, folder)
    assert not alive(children)
    assert [step for step, _ in steps_taken(folder)] == list(range(1, 21))


def test_a_sweep_outlives_its_ledger_s_writer(shown_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    process = start_sweep(shown_home, folder)
    wait_for_step(process, folder)
    children = descendants(process.pid)
    [killed] = writers_of(process)
    killed.kill()
    (folder / "go").touch()
    wait_until(lambda: writers_of(process) not in ([], [killed]), "another writer", 60.0)
    code, out, err = end(process)
    assert code == 0, err
    assert '"status": "finished"' in out
    [row] = ledger_of(shown_home).sweeps.newest()
    assert_same_trials(shown_home, row.id, folder)
    assert not alive(children)
    assert max(step for step, _ in steps_taken(folder)) > HELD
