"""Sweeps written into a ledger by hand, and what an MLflow store shows of them."""

from __future__ import annotations

import math
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from piste import catalog, tracking
from piste.config import override, to_toml, validate
from piste.ledger import Ledger, Message, Row
from piste.provenance import collect
from piste.sweep_tracking import SweepRelay

METRIC = "train/loss"


def plan(ledger: Ledger, folder: Path, name: str = "bowl-sweep-1", repeats: int = 1, **section: Any) -> str:
    """Records a sweep of the quadratic bowl that is running."""
    space = {"optimizer.lr": {"log_uniform": [0.01, 2.0]}, "seed": {"repeats": repeats}}
    section = {"metric": METRIC, "trials": 6 * repeats, "space": space, **section}
    model = catalog.load_workload("quadratic").Config
    config = validate(model, override({"workload": "quadratic"}, {"sweep": section}), "bowl")
    directory = folder / "sweeps" / name
    directory.mkdir(parents=True)
    (directory / "recipe.toml").write_text(to_toml(config))
    ledger.sweeps.create(
        id=name,
        recipe="bowl",
        workload="quadratic",
        config=config.model_dump(mode="json"),
        provenance=collect("the-code", "the-data"),
        directory=str(directory),
        trials=section["trials"],
    )
    ledger.sweeps.claim(name, "nowhere:1")
    return name


def run_columns(sweep_id: str, number: int, run_id: str, seed: int = 0, **columns: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {"recipe": "bowl", "workload": "quadratic", "config": {}, "provenance": {}}
    usual |= {"identity": run_id, "cell": "", "directory": "", "status": "planned", "attempt": 0}
    usual |= {"driver": None, "created": 1000.0 + number, "finished": None, "error": None}
    usual |= {"recomputed_different": 0, "sweep_id": sweep_id, "started": None, "seconds": 0.5}
    return {"id": run_id, "seed": seed, **usual, **columns}


def add(
    ledger: Ledger, sweep_id: str, number: int, repeats: int = 1, reuses: str | None = None, **values: Any
) -> str:
    """Records a trial: planned, or one that takes another's run."""
    run_id = reuses or f"{sweep_id}-{number:05d}"
    trial: dict[str, Any] = {"sweep_id": sweep_id, "number": number, "cell": number // repeats}
    trial |= {
        "memory": None,
        "values": values or {"optimizer.lr": 0.1 * (number // repeats + 1)},
        "run_id": run_id,
    }
    trial |= {"reused": reuses is not None, "outcome": None, "value": None, "special": None, "step": None}
    runs = [] if reuses else [run_columns(sweep_id, number, run_id, seed=number % repeats)]
    ledger.sweeps.record(runs, [trial])
    return run_id


def log(ledger: Ledger, run_id: str, *values: float, start: int = 1, key: str = METRIC) -> None:
    """Records an objective a step, with another metric beside it, in an attempt that has begun."""
    steps = list(enumerate(values, start))
    rows = [Row("a/first", step, step / 7, 2000 + step) for step, _ in steps]
    rows += [Row(key, step, value, 2000 + step) for step, value in steps]
    for at in range(0, len(rows), 1000):
        ledger.apply(Message(run_id, ledger.run(run_id).attempt, at, tuple(rows[at : at + 1000])))


def close(ledger: Ledger, sweep_id: str, number: int, run_id: str, outcome: str, error: str = "") -> None:
    ledger.set_status(run_id, outcome, error or None)
    last = ledger.sweeps.objective([run_id], METRIC).get(run_id)
    step, value = last if last is not None else (None, None)
    ledger.sweeps.settle(sweep_id, number, outcome, value, step)


def compute(ledger: Ledger, sweep_id: str, number: int, *values: float, outcome: str = "finished") -> None:
    """A trial from its plan to its end."""
    run_id = f"{sweep_id}-{number:05d}"
    ledger.begin_attempt(run_id)
    log(ledger, run_id, *values)
    close(ledger, sweep_id, number, run_id, outcome, "it fell" if outcome == "failed" else "")


def relay_whole(ledger: Ledger, sweep_id: str, store: Path) -> SweepRelay:
    relay = SweepRelay(ledger, sweep_id, f"sqlite:///{store}")
    assert relay.step() is True
    assert relay.pending() == 0
    return relay


def asked(store: Path, query: str, *values: Any) -> list[tuple[Any, ...]]:
    plain = sqlite3.connect(store)
    found = plain.execute(query, values).fetchall()
    plain.close()
    return found


def runs_of(store: Path, sweep_id: str) -> dict[str, tuple[str, dict[str, str]]]:
    """The sweep's active MLflow runs from MLflow's own tables: status and tags."""
    query = """select r.run_uuid, r.status from runs r join tags t on t.run_uuid = r.run_uuid
        where t.key = 'piste.sweep_id' and t.value = ? and r.lifecycle_stage = 'active'"""
    tags = "select key, value from tags where run_uuid = ?"
    return {run: (status, dict(asked(store, tags, run))) for run, status in asked(store, query, sweep_id)}


def metrics_of(store: Path, run: str) -> list[tuple[Any, ...]]:
    return sorted(asked(store, "select key, step, value, timestamp from metrics where run_uuid = ?", run))


def check_view(
    ledger: Ledger, store: Path, sweep_id: str, repeats: int = 1, lacking: Sequence[int] = ()
) -> None:
    """MLflow has what the ledger has: every trial once, its rows once, what came of it, in its place."""
    runs = runs_of(store, sweep_id)
    kinds = defaultdict(list)
    for run, (_, tags) in runs.items():
        kinds[tags["piste.kind"]].append((int(tags.get("piste.trial", tags.get("piste.sweep_cell", 0))), run))
    ((_, own),) = kinds["sweep"]
    assert runs[own][0] == tracking.TERMINAL.get(ledger.sweeps.get(sweep_id).status, "RUNNING")
    cells = dict(kinds["cell"])
    assert len(cells) == len(kinds["cell"]), "every cell once"
    expected = [t for t in ledger.sweeps.trials(sweep_id) if t.number not in lacking]
    assert sorted(n for n, _ in kinds["trial"]) == [t.number for t in expected], "every trial once"
    shown = dict(kinds["trial"])
    for trial in expected:
        status, tags = runs[shown[trial.number]]
        ended = {"finished": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}.get(trial.outcome or "")
        open_now = "RUNNING" if ledger.sweeps.get(sweep_id).status == "running" else "KILLED"
        assert status == (ended or open_now), trial
        assert tags["mlflow.parentRunId"] == (cells[trial.cell] if repeats > 1 else own)
        assert tags.get("piste.status") == trial.outcome
        assert tags.get("piste.error") == (trial.error if trial.outcome else None)
        assert trial.run_id == tags["piste.reused" if trial.reused else "piste.run_id"]
        rows = []
        for row in ledger.metrics_after(trial.run_id, 0, 10**6):
            name = row.key if row.special is None else f"nonfinite/{row.key}"
            rows.append((name, row.step, 1.0 if row.value is None else row.value, row.timestamp))
        assert metrics_of(store, shown[trial.number]) == sorted(rows), "every row once"
        parameters = dict(
            asked(store, "select key, value from params where run_uuid = ?", shown[trial.number])
        )
        assert parameters == {k: str(v) for k, v in {**trial.values, "seed": trial.seed}.items()}
    for number, run in cells.items():
        members = [t for t in expected if t.cell == number]
        values = [t.value for t in members if t.outcome == "finished" and t.value is not None]
        if all(t.outcome for t in members):
            assert runs[run][0] == ("FINISHED" if values else "FAILED")
            means = [m for m in metrics_of(store, run) if m[0] == METRIC]
            assert len(means) == bool(values)
            assert not values or means[0][2] == pytest.approx(sum(values) / len(values))
        assert runs[run][1]["mlflow.parentRunId"] == own


def best_series(store: Path, run: str, name: str = f"best/{METRIC}") -> list[tuple[int, float]]:
    return sorted((step, value) for key, step, value, _ in metrics_of(store, run) if key == name)


def check_best(ledger: Ledger, store: Path, relay: SweepRelay, until: int) -> None:
    """Each point is the best of so many trials, and none is missing where that changes or ends."""
    values = [t.value for t in ledger.sweeps.trials(relay._id)][:until]
    finite = [math.inf if v is None or not math.isfinite(v) else v for v in values]
    exact = [min(finite[:n]) for n in range(1, until + 1)]
    assert relay.mlflow_run_id is not None
    points = best_series(store, relay.mlflow_run_id)
    assert points == [(n, exact[n - 1]) for n, _ in points], "no point is wrong, none is doubled"
    changes = [n for n in range(1, until + 1) if exact[n - 1] < min([math.inf, *exact[: n - 1]])]
    assert set(changes) <= {n for n, _ in points}
