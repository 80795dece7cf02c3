"""Sweeps on Ray Tune: the trials of a plain loop, also when processes are killed."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.platform.driving import (
    PACED,
    steps_taken,
    wait_until,
)
from tests.platform.heads import Head

import piste
from piste import running
from piste.config import Recipe
from piste.errors import BadInput
from piste.ledger import Ledger, open_ledger
from piste.sweeping import SweepResult, sweep

pytest_plugins = ["tests.platform.fixtures"]

LR = {"log_uniform": [1e-3, 0.3]}


def paced(section: dict[str, Any], workers: int = 1, **pace: Any) -> Recipe:
    resources = {"workers": workers}
    table = {"resources": resources, "tracking": {"system_metrics": False}, "pace": pace}
    table["sweep"] = {"metric": "train/loss", **section}
    return running.resolve({"workload": PACED, **table}, PACED)


def told(ledger: Ledger, sweep_id: str) -> list[tuple[Any, ...]]:
    """What identifies and decides every trial."""
    keys = ("number", "cell", "seed", "values", "outcome", "value", "step")
    return [tuple(getattr(t, key) for key in keys) for t in ledger.sweeps.trials(sweep_id)]


def histories(result: SweepResult) -> list[list[tuple[int, float]]]:
    return [open_ledger().history(t.run_id, "train/loss") for t in result.trials]


@pytest.mark.slow
def test_a_killed_trial_actor_is_replaced_and_the_trials_are_those_of_a_plain_loop(
    no_view: None, local_ray: None, tmp_path: Path
) -> None:
    """Three optimizers' worth of cells; those of the second stratum wait at step 13, where one is killed."""
    folders = [tmp_path / "free", tmp_path / "held"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "go").touch()
    space = {"pace.records": {"grid": [str(f) for f in folders]}, "optimizer.lr": LR, "seed": {"repeats": 2}}
    config = paced({"trials": 8, "searcher": "tpe", "batch": 1, "space": space}, hold_at=13)

    def kill_one() -> int:
        held = folders[1]
        wait_until(lambda: any(step == 13 for step, _ in steps_taken(held)), "step 13 of a held trial")
        pid = next(pid for step, pid in steps_taken(held) if step == 13)
        os.kill(pid, signal.SIGKILL)
        (held / "go").touch()
        return pid

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill_one)
        disturbed = sweep(config)
        killed = killer.result()
    undisturbed = sweep(config, local=True, fresh=True)
    assert told(open_ledger(), disturbed.id) == told(open_ledger(), undisturbed.id)
    assert histories(disturbed) == histories(undisturbed)
    rows = [open_ledger().run(t.run_id) for t in disturbed.trials]
    assert sorted(row.attempt for row in rows)[-1] == 2
    assert {row.recomputed_different for row in rows} == {0}
    pids = {pid for folder in folders for _, pid in steps_taken(folder)} - {killed, os.getpid()}
    assert len(pids) <= 3  # an actor is used again: eight trials and one kill need no more


@pytest.mark.slow
def test_a_trial_of_two_workers_is_pruned_and_gives_its_processors_back(
    no_view: None, local_ray: None, ray_head: Head, tmp_path: Path
) -> None:
    """The second trial diverges, and waits at step 13 until it is pruned; the third needs its processors.

    Another Ray on this host is none of its business.
    """
    import ray

    free, held, last = (tmp_path / name for name in ("free", "held", "last"))
    for folder in (free, held, last):
        folder.mkdir()
        if folder is not held:
            (folder / "go").touch()
    wild = {"grid": [3.0], "when": {"pace.records": str(held)}}
    space = {"pace.records": {"grid": [str(free), str(held), str(last)]}, "optimizer.lr": wild}
    asha = {"grace_steps": 5, "reduction_factor": 2.0}
    section = {"searcher": "grid", "scheduler": "asha", "asha": asha, "space": space}
    result = sweep(paced(section, workers=2, hold_at=13))
    assert [t.outcome for t in result.trials] == ["finished", "pruned", "finished"]
    assert 5 <= (result.trials[1].step or 0) <= 12  # what it logged before it waited
    assert open_ledger().run(result.trials[1].run_id).status == "pruned"
    assert max(step for step, _ in steps_taken(held)) <= 13
    every = ray.cluster_resources()["CPU"]  # type: ignore[no-untyped-call]
    wait_until(lambda: ray.available_resources().get("CPU") == every, "all processors are free", 60.0)  # type: ignore[no-untyped-call]
    alone = piste.run(paced({"searcher": "grid", "space": space}), local=True)
    assert result.trials[0].value == pytest.approx(alone.metrics["train/loss"], rel=1e-12)


def test_trials_that_cannot_run_at_a_time_are_refused_before_any_starts(
    no_view: None, local_ray: None
) -> None:
    section = {"trials": 2, "concurrency": 3, "space": {"optimizer.lr": LR}}
    with pytest.raises(BadInput, match=r"sweep.concurrency: 3 trials x 2 CPUs = 6 CPUs, but the cluster has"):
        sweep(paced(section, workers=2))
    [row] = open_ledger().sweeps.newest()
    assert row.status == "failed"
    assert open_ledger().sweeps.trials(row.id) == []


def test_trials_that_fail_leave_the_sweep_and_each_other_alone(
    no_view: None, local_ray: None, tmp_path: Path
) -> None:
    folders = [tmp_path / "good", tmp_path / "bad"]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "mended").touch()
    space = {"pace.records": {"grid": [str(f) for f in folders]}, "optimizer.lr": LR}
    result = sweep(paced({"trials": 6, "space": space}, fail_at=7))
    assert result.status == "finished"
    assert [t.outcome for t in result.trials] == ["finished", "failed"] * 3
    assert {t.error for t in result.trials[1::2]} == {"RuntimeError: the laboratory is on fire"}
