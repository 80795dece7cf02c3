"""Runs and sweeps that are disturbed while they stand at a step, and what must have come of them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import func, select
from tests.platform.driving import (
    alive,
    assert_same_weights,
    descendants,
    done_again,
    end,
    ledger_of,
    paced_recipe,
    start_piste,
    steps_taken,
    wait_until,
    write,
)

from piste.ledger import Ledger, Metric

STEPS, EVERY, HELD = 20, 5, 13
SWEEP = """
workload = "tests.platform.paced"
[pace]
records = "{records}"
hold_at = {hold_at}
[tracking]
system_metrics = false
[sweep]
metric = "train/loss"
trials = 12
searcher = "tpe"
batch = 3
[sweep.space]
"optimizer.lr" = {{ log_uniform = [1e-3, 0.3] }}
seed = {{ repeats = 2 }}
"""


def wait_for_step(
    process: subprocess.Popen[str], folder: Path, step: int = HELD, ranks: Sequence[int] = (0,)
) -> None:
    """Waits until all of these ranks stand before a step; fails where the process has ended."""

    def there() -> bool:
        assert process.poll() is None, end(process)
        return all(any(taken == step for taken, _ in steps_taken(folder, rank)) for rank in ranks)

    wait_until(there, f"step {step}", 300.0)


def start_run(home: Path, folder: Path, *arguments: str, **pace: Any) -> subprocess.Popen[str]:
    """A run on Ray of two workers that stands before a step."""
    recipe = paced_recipe(folder, "workers = 2", hold_at=HELD, **pace)
    process = start_piste(home, "run", recipe, "--json", *arguments)
    wait_for_step(process, folder, HELD, (0, 1))
    return process


def resumed(home: Path, run_id: str, *arguments: str) -> str:
    """Resumes a run to its end; returns what was said on stderr."""
    code, out, err = end(start_piste(home, "resume", run_id, "--json", *arguments))
    assert code == 0, err
    assert '"status": "finished"' in out
    return err


def assert_whole(
    home: Path, run_id: str, undisturbed: tuple[Path, str], folder: Path, again: int = EVERY
) -> None:
    """A run equals an undisturbed one, each metric is there once, and few steps were taken twice."""
    ledger, whole = ledger_of(home), ledger_of(undisturbed[0])
    assert ledger.history(run_id, "train/loss") == whole.history(undisturbed[1], "train/loss")
    assert rows_of(ledger, run_id) == STEPS
    row = ledger.run(run_id)
    assert (row.status, row.recomputed_different) == ("finished", 0)
    assert all(done_again(folder, rank) <= again for rank in range(row.config["resources"]["workers"]))
    assert_same_weights(Path(whole.run(undisturbed[1]).directory), Path(row.directory))


def rows_of(ledger: Ledger, run_id: str) -> int:
    """How many metrics a run has in the ledger."""
    with ledger.engine.connect() as connection:
        return int(connection.execute(select(func.count()).where(Metric.run_id == run_id)).scalar_one())


def start_sweep(home: Path, folder: Path, *arguments: str, hold_at: int = HELD) -> subprocess.Popen[str]:
    """A sweep of twelve trials, which wait before a step for the file `go` in `folder`."""
    folder.mkdir(exist_ok=True)
    recipe = write(folder / "paced.toml", SWEEP.format(records=folder, hold_at=hold_at))
    return start_piste(home, "sweep", recipe, "--json", *arguments)


def told(ledger: Ledger, sweep_id: str) -> list[tuple[Any, ...]]:
    """What identifies and decides every trial of a sweep."""
    keys = ("number", "cell", "seed", "values", "outcome", "value", "step")
    return [tuple(getattr(t, key) for key in keys) for t in ledger.sweeps.trials(sweep_id)]


def assert_same_trials(home: Path, sweep_id: str, folder: Path) -> None:
    """The trials of a sweep are those of a plain loop that nothing disturbs, and no metric is there twice."""
    (folder / "go").touch()
    ledger = ledger_of(home)
    trials = ledger.sweeps.trials(sweep_id)
    assert len(trials) == 12
    assert [rows_of(ledger, t.run_id) for t in trials] == 12 * [STEPS]
    assert {ledger.run(t.run_id).recomputed_different for t in trials} == {0}
    code, _, err = end(start_sweep(home, folder, "--local", "--fresh"))
    assert code == 0, err
    assert told(ledger, sweep_id) == told(ledger, ledger.sweeps.newest()[0].id)


def writers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of a driver's ledger writer on its local Ray: one, or none while it is restarted."""
    return [p for p in descendants(process.pid) if any("ray::Writer" in line for line in alive([p]))]


def workers_of(folder: Path) -> list[psutil.Process]:
    """The processes of the two workers that have taken steps."""
    return [psutil.Process(steps_taken(folder, rank)[-1][1]) for rank in (0, 1)]
