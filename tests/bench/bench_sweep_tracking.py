"""What showing a sweep in MLflow costs: trials relayed a second, and a poll that finds nothing new.

    python tests/bench/bench_sweep_tracking.py [--trials 300]

The relay's peer, timed in turn with it in the same process, is a bare client that makes as many runs in
another store of the same kind: `create_run`, `log_batch` with parameters and metrics, `set_terminated`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

METRIC = "train/loss"
TURN = 10  # runs that one of the two makes before it is the other's turn


def begin(ledger: Any, folder: Path, name: str, trials: int) -> None:
    """A running sweep of the quadratic bowl that has no trial yet."""
    from piste.config import Recipe

    section = {"metric": METRIC, "trials": trials, "space": {"optimizer.lr": {"uniform": [0.0, 2.0]}}}
    config = Recipe.model_validate({"workload": "quadratic", "sweep": section}).model_dump(mode="json")
    usual = {"recipe": "bench", "workload": "quadratic", "provenance": {}, "directory": str(folder / name)}
    ledger.sweeps.create(id=name, config=config, trials=trials, **usual)
    ledger.sweeps.claim(name, "nowhere:1")


def add(ledger: Any, name: str, numbers: range) -> None:
    """A pack: trials that have ended, each with one value of two metrics."""
    runs, trials, metrics = [], [], list[dict[str, Any]]()
    for number in numbers:
        run_id = f"{name}-{number:05d}"
        run: dict[str, Any] = {
            "id": run_id,
            "recipe": "bench",
            "workload": "quadratic",
            "provenance": {},
            "directory": "",
        }
        run |= {"seed": 0, "config": {}, "identity": "", "cell": "", "error": None, "status": "finished"}
        run |= {"attempt": 1, "driver": None, "created": 1000.0, "finished": 1001.0, "started": None}
        runs.append({**run, "recomputed_different": 0, "sweep_id": name, "seconds": 0.1})
        trial: dict[str, Any] = {
            "sweep_id": name,
            "number": number,
            "cell": number,
            "values": {"optimizer.lr": number / 7},
        }
        trial |= {"memory": None, "run_id": run_id, "reused": False, "outcome": "finished", "step": 100}
        trials.append({**trial, "value": number / 7, "special": None})
        for key in (METRIC, "train/gradient"):
            metric = {"run_id": run_id, "key": key, "step": 100, "special": None, "timestamp": 1001000}
            metrics.append({**metric, "value": number / 7})
    ledger.sweeps.record(runs, trials, metrics)


def bare(made: Any, experiment: str, numbers: range) -> None:
    """A client that makes as many runs with the same parameters and metrics."""
    from mlflow.entities import Metric, Param

    for number in numbers:
        run = made.create_run(experiment, 1000000, {}, run_name=f"trial {number}").info.run_id
        metrics = [Metric(key, number / 7, 1001000, 100) for key in (METRIC, "train/gradient")]
        parameters = [Param("optimizer.lr", str(number / 7)), Param("seed", "0")]
        made.log_batch(run, metrics=metrics, params=parameters)
        made.set_terminated(run, "FINISHED", 1001000)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rates(ledger: Any, folder: Path, empty: Path, trials: int) -> tuple[float, float, float]:
    """Runs a second of the bare client and of the relay, and the median ratio of their turns."""
    from piste.sweep_tracking import SweepRelay
    from piste.tracking import client

    made = client(f"sqlite:///{shutil.copy(empty, folder / 'bare.db')}")
    experiment = made.create_experiment("bare", artifact_location=str(folder / "files"))
    begin(ledger, folder, "packed", trials + TURN)
    relay = SweepRelay(ledger, "packed", f"sqlite:///{shutil.copy(empty, folder / 'relayed.db')}")
    times: list[tuple[float, float]] = []
    for turn, start in enumerate(range(0, trials + TURN, TURN)):
        numbers = range(start, start + TURN)
        add(ledger, "packed", numbers)
        one: dict[str, Callable[[], object]] = {
            "bare": partial(bare, made, experiment, numbers),
            "relay": relay.step,
        }
        taken = {kind: seconds(one[kind]) for kind in sorted(one, reverse=turn % 2 == 1)}
        times.append((taken["bare"], taken["relay"]))
    assert relay.pending() == 1  # the sweep's own end
    peer, ours = zip(*times[1:], strict=True)  # the first turn is for warming up
    ratio = statistics.median(b / r for b, r in times[1:])
    return TURN / statistics.median(peer), TURN / statistics.median(ours), ratio


def poll_milliseconds(ledger: Any, folder: Path, empty: Path) -> float:
    """The median poll of a sweep with 1,000 trials that have ended, when nothing is new."""
    from piste.sweep_tracking import SweepRelay

    begin(ledger, folder, "polled", 1000)
    add(ledger, "polled", range(1000))
    relay = SweepRelay(ledger, "polled", f"sqlite:///{shutil.copy(empty, folder / 'polled.db')}")
    relay.step()
    return statistics.median(seconds(relay.step) for _ in range(50)) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PISTE_HOME"] = str(folder)
        from piste.ledger import Ledger
        from piste.tracking import client

        ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
        empty = folder / "empty.db"
        client(f"sqlite:///{empty}")
        peer, ours, ratio = rates(ledger, folder, empty, options.trials)
        print(f"runs a second, bare client      {peer:8.1f}")
        print(f"runs a second, relay            {ours:8.1f}")
        print(f"relay / bare, median of turns   {ratio:8.2f}   (target: at least 0.80)")
        print(f"poll of 1,000 ended trials      {poll_milliseconds(ledger, folder, empty):8.1f} ms")


if __name__ == "__main__":
    main()
