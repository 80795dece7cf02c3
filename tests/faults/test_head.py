"""The head of a cluster dies: its jobs are reported lost, and go on on a new head."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.platform.driving import (
    assert_same_weights,
    ledger_of,
    paced_recipe,
    steps_taken,
    wait_until,
    write,
)
from tests.platform.heads import Head, piste_job

import piste
from piste.ledger import Ledger

pytest_plugins = ["tests.platform.fixtures"]
pytestmark = pytest.mark.fault

SWEEP = """[sweep]
metric = "train/loss"
trials = 6
searcher = "random"
[sweep.space]
"optimizer.lr" = { uniform = [0.01, 0.2] }
"""


@pytest.fixture
def head() -> Iterator[Head]:
    """A head of the test's own, which it may kill."""
    made = Head()
    yield made
    made.kill()
    shutil.rmtree(made.folder, ignore_errors=True)


def status(head: Head, home: Path, job: str) -> dict[str, str]:
    code, out, err = piste_job(head, home, "jobs", "status", job, "--json")
    assert code == 0, err
    found: dict[str, str] = json.loads(out)
    return found


def test_a_run_goes_on_when_the_head_was_killed(head: Head, shown_home: Path, tmp_path: Path) -> None:
    undisturbed = piste.run(paced_recipe(tmp_path / "undisturbed"), local=True)
    folder = tmp_path / "records"
    recipe = paced_recipe(folder, hold_at=13)
    code, _, err = piste_job(head, shown_home, "submit", "run", recipe, "--id", "first", "--no-follow")
    assert code == 0, err
    wait_until(lambda: any(step == 13 for step, _ in steps_taken(folder)), "step 13")
    ledger = ledger_of(shown_home)
    run_id = ledger.jobs.get("first").subject or ""
    head.kill()
    assert status(head, shown_home, "first")["status"] in {"sent", "running"}  # nobody can say
    head.start()
    lost = status(head, shown_home, "first")
    assert (lost["status"], ledger.run(run_id).status) == ("lost", "interrupted")
    assert lost["resume"] == f"piste submit resume {run_id} --address {head.address}"
    (folder / "go").touch()
    code, out, err = piste_job(head, shown_home, "submit", "resume", run_id)
    assert code == 0, out + err
    assert ledger.run(run_id).status == "finished"
    assert ledger.history(run_id, "train/loss") == undisturbed.history("train/loss")
    assert_same_weights(undisturbed.directory, Path(ledger.run(run_id).directory))


def trials(ledger: Ledger, sweep_id: str) -> list[tuple[int, dict[str, object], float | None]]:
    return [(t.number, t.values, t.value) for t in ledger.sweeps.trials(sweep_id)]


def test_a_sweep_goes_on_when_the_head_was_killed(head: Head, shown_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    recipe = paced_recipe(folder)
    write(recipe, recipe.read_text() + "\n" + SWEEP)
    code, _, err = piste_job(head, shown_home, "submit", "sweep", recipe, "--id", "first", "--no-follow")
    assert code == 0, err
    ledger = ledger_of(shown_home)

    def some_are_done() -> bool:
        subject = ledger.jobs.get("first").subject
        return subject is not None and any(t.outcome for t in ledger.sweeps.trials(subject))

    wait_until(some_are_done, "a finished trial", 240.0)
    head.kill()
    sweep_id = ledger.jobs.get("first").subject or ""
    left = [t.number for t in ledger.sweeps.trials(sweep_id) if t.outcome is None]
    assert left or len(ledger.sweeps.trials(sweep_id)) < 6
    head.start()
    lost = status(head, shown_home, "first")
    assert (lost["status"], ledger.sweeps.get(sweep_id).status) == ("lost", "interrupted")
    assert lost["resume"] == f"piste submit sweep --resume {sweep_id} --address {head.address}"
    code, out, err = piste_job(head, shown_home, *lost["resume"].split()[1:])
    assert code == 0, out + err
    assert ledger.sweeps.get(sweep_id).status == "finished"
    undisturbed = piste.sweep(recipe, local=True, fresh=True)
    assert trials(ledger, sweep_id) == trials(ledger, undisturbed.id)


def test_a_killed_driver_fails_its_job_and_the_run_goes_on(
    head: Head, shown_home: Path, tmp_path: Path
) -> None:
    undisturbed = piste.run(paced_recipe(tmp_path / "undisturbed"), local=True)
    folder = tmp_path / "records"
    recipe = paced_recipe(folder, hold_at=13)
    submit = ("submit", "run", recipe, "--local", "--id", "first", "--no-follow")
    code, _, err = piste_job(head, shown_home, *submit)
    assert code == 0, err
    wait_until(lambda: any(step == 13 for step, _ in steps_taken(folder)), "step 13")
    ledger = ledger_of(shown_home)
    run_id = ledger.jobs.get("first").subject or ""
    os.kill(steps_taken(folder)[-1][1], signal.SIGKILL)
    wait_until(lambda: status(head, shown_home, "first")["status"] == "failed", "the job's end", 60.0)
    assert ledger.run(run_id).status == "interrupted"
    (folder / "go").touch()
    code, out, err = piste_job(head, shown_home, "submit", "resume", run_id, "--local")
    assert code == 0, out + err
    assert ledger.history(run_id, "train/loss") == undisturbed.history("train/loss")
    assert_same_weights(undisturbed.directory, Path(ledger.run(run_id).directory))
