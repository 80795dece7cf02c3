"""SIGTERM and drained hosts: a checkpoint within the grace period, an exit code of its own, nothing lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from tests.faults.disturbed import (
    HELD,
    STEPS,
    assert_same_trials,
    assert_whole,
    resumed,
    start_run,
    start_sweep,
    wait_for_step,
)
from tests.faults.hosts import Hosts
from tests.platform.driving import (
    alive,
    descendants,
    done_again,
    end,
    ledger_of,
    paced_recipe,
    start_piste,
    steps_taken,
    wait_until,
)

from piste.checkpoints import CheckpointStore
from piste.errors import Terminated
from piste.stopping import on_terminate

pytest_plugins = ["tests.platform.fixtures"]


def terminate(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


class TestTheSignal:
    def test_the_first_asks_the_second_ends(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with on_terminate(60.0) as stop:
            assert not stop.is_set()
            terminate(os.getpid())
            assert stop.is_set()
            with pytest.raises(Terminated):
                terminate(os.getpid())
        assert signal.getsignal(signal.SIGTERM) is before

    def test_the_grace_period_ends(self) -> None:
        with on_terminate(0.2) as stop:
            asked = time.monotonic()  # before: the time begins with the signal
            terminate(os.getpid())
            with pytest.raises(Terminated):
                wait_until(lambda: time.monotonic() > asked + 30.0, "it is ended")
            assert 0.2 <= time.monotonic() - asked < 10.0
            assert stop.is_set()

    def test_nothing_comes_after_the_context(self) -> None:
        came: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, _frame: came.append(number))
        try:
            with on_terminate(0.1):
                terminate(os.getpid())
            left = time.monotonic()
            wait_until(lambda: time.monotonic() > left + 0.5, "longer than the grace period")
            assert came == []
        finally:
            signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("how", ["the grace period is over", "SIGTERM again", "Ctrl-C"])
def test_a_run_that_does_not_heed_is_ended_without_a_checkpoint(
    shown_home: Path, tmp_path: Path, no_view: None, how: str
) -> None:
    folder = tmp_path / "records"
    grace = 1.0 if how == "the grace period is over" else 60.0
    recipe = paced_recipe(folder, f"grace_seconds = {grace}", hold_at=HELD, deaf="true")
    process = start_piste(shown_home, "run", recipe, "--local", "--json")
    wait_for_step(process, folder)
    threads = psutil.Process(process.pid).num_threads()
    pressed = time.monotonic()
    process.send_signal(signal.SIGTERM)
    if grace == 60.0:
        # Two at once would be one; that it has taken the first is seen by the thread that waits from then on.
        wait_until(lambda: psutil.Process(process.pid).num_threads() > threads, "it has taken the first")
        process.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
    code, _, err = end(process)
    assert code == (130 if how == "Ctrl-C" else 143), err
    assert time.monotonic() - pressed < 30.0
    [row] = ledger_of(shown_home).runs()
    by = "the user" if how == "Ctrl-C" else "SIGTERM"
    assert (row.status, row.error) == ("interrupted", f"interrupted by {by}")
    assert f"piste resume {row.id} --local" in err
    assert CheckpointStore(Path(row.directory) / "checkpoints").steps() == [5, 10]


@pytest.mark.fault
def test_a_sweep_in_one_process_stops_its_trial_with_a_checkpoint(shown_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    process = start_sweep(shown_home, folder, "--local")
    wait_for_step(process, folder)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 143, err
    [row] = ledger_of(shown_home).sweeps.newest()
    assert (row.status, row.error) == ("interrupted", "asked to stop")
    assert f"piste sweep --resume {row.id} --local" in err
    [trial] = ledger_of(shown_home).sweeps.trials(row.id)[:1]
    assert (trial.outcome, trial.status) == (None, "interrupted")
    assert ledger_of(shown_home).history(trial.run_id, "train/loss")[-1][0] == HELD
    (folder / "go").touch()
    code, _, err = end(start_piste(shown_home, "sweep", "--resume", row.id, "--local", "--json"))
    assert code == 0, err
    assert len(steps_taken(folder)) == 12 * STEPS  # not one was taken twice
    assert_same_trials(shown_home, row.id, folder)


@pytest.mark.fault
def test_a_run_on_ray_stops_with_a_checkpoint(
    two: tuple[Path, str], shown_home: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "records"
    process = start_run(shown_home, folder)
    children = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 143, err
    [row] = ledger_of(shown_home).runs()
    assert (row.status, row.error) == ("interrupted", "asked to stop")  # within the grace period
    assert f"piste resume {row.id}" in err
    assert "Traceback" not in err
    assert CheckpointStore(Path(row.directory) / "checkpoints").steps() == [10, HELD]
    wait_until(lambda: not alive(children), "the end of all processes", 60.0)
    resumed(shown_home, row.id)
    assert_whole(shown_home, row.id, two, folder)
    assert [done_again(folder, rank) for rank in (0, 1)] == [0, 0]


@pytest.mark.fault
def test_a_sweep_on_ray_stops_its_trials_with_checkpoints(shown_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    process = start_sweep(shown_home, folder)
    wait_for_step(process, folder)
    children = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 143, err
    [row] = ledger_of(shown_home).sweeps.newest()
    assert (row.status, row.error) == ("interrupted", "asked to stop")
    assert f"piste sweep --resume {row.id}" in err
    assert "Traceback" not in err
    trials = ledger_of(shown_home).sweeps.trials(row.id)
    assert trials
    assert {t.outcome for t in trials} == {None}
    assert {t.status for t in trials} <= {"interrupted", "planned"}
    wait_until(lambda: not alive(children), "the end of all processes", 60.0)
    (folder / "go").touch()
    code, _, err = end(start_piste(shown_home, "sweep", "--resume", row.id, "--json"))
    assert code == 0, err
    assert len(steps_taken(folder)) == 12 * STEPS  # not one was taken twice
    assert_same_trials(shown_home, row.id, folder)


@pytest.mark.fault
@pytest.mark.parametrize("allowed", [-1, 0])
def test_a_run_moves_from_a_host_that_is_taken_away(
    two: tuple[Path, str], shown_home: Path, tmp_path: Path, hosts: Hosts, allowed: int
) -> None:
    folder = tmp_path / "records"
    options = {"address": hosts.address, "one_host": "true", "max_failures": 0, "max_preemptions": allowed}
    words = [word for name, value in options.items() for word in (f"--resources.{name}", str(value))]
    process = start_run(shown_home, folder, *words)
    taken = hosts.of(steps_taken(folder, 1)[-1][1])
    hosts.add()
    hosts.take_away(taken)
    if allowed == 0:
        code, _, err = end(process)
        assert code == 1, err
        [row] = ledger_of(shown_home).runs()
        assert "preempted 1 times, and resources.max_preemptions = 0" in err
        assert CheckpointStore(Path(row.directory) / "checkpoints").steps() == [10, HELD]
        resumed(shown_home, row.id)
    else:
        wait_until(lambda: steps_taken(folder, 1)[-1][0] > HELD, "the run goes on", 120.0)
        code, _, err = end(process)
        assert code == 0, err
    [row] = ledger_of(shown_home).runs()
    assert row.attempt == 2
    assert_whole(shown_home, row.id, two, folder)
    assert [done_again(folder, rank) for rank in (0, 1)] == [0, 0]


@pytest.mark.fault
def test_a_sweep_s_trial_moves_from_a_host_that_is_taken_away(
    shown_home: Path, tmp_path: Path, hosts: Hosts
) -> None:
    folder = tmp_path / "records"
    words = ["--resources.address", hosts.address, "--resources.one_host", "true"]
    process = start_sweep(shown_home, folder, *words)
    wait_for_step(process, folder)
    first = steps_taken(folder)[-1][1]
    hosts.add()
    hosts.take_away(hosts.of(first))

    def moved() -> bool:
        assert process.poll() is None, end(process)
        return any(step == HELD + 1 for step, _ in steps_taken(folder))

    wait_until(moved, "the trial goes on elsewhere", 120.0)
    (folder / "go").touch()
    code, _, err = end(process)
    assert code == 0, err
    assert len(steps_taken(folder)) == 12 * STEPS  # not one was taken twice
    [row] = ledger_of(shown_home).sweeps.newest()
    assert_same_trials(shown_home, row.id, folder)
