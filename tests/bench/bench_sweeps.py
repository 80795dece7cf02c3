"""Sweeps: the cost of a trial on Ray Tune, of a packed trial, and of a resume.

    python tests/bench/bench_sweeps.py

Every figure stands beside its peer from the same run: Ray Tune's bare loop with reused actors, and Optuna in
memory on the same objective.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
import psutil

from piste import running, tuning
from piste.config import Recipe, Resources
from piste.ledger import open_ledger
from piste.schedule import Schedule
from piste.sweeping import Tell, execute_sweep, plan_sweep, resumable_sweep, sweep
from piste.training import cluster
from piste.trials import Work

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Clock:
    """Notes when work starts and ends."""

    def __init__(self) -> None:
        self.started: list[float] = []
        self.ended: list[tuple[float, int]] = []

    @contextmanager
    def sweep(self, schedule: Schedule) -> Iterator[Tell]:
        def tell(event: str, work: Work) -> None:
            if event == "started":
                self.started.append(time.perf_counter())
            else:
                self.ended.append((time.perf_counter(), len(work.trials)))

        yield tell

    def each(self, skip: int = 20) -> float:
        """Seconds a trial at steady state: the first trials start the actors."""
        times = [moment for moment, _ in self.ended]
        return (times[-1] - times[skip]) / (len(times) - 1 - skip)


def figure(name: str, value: float, target: float | None = None, *, most: bool = False) -> None:
    """Prints a figure, and whether it reaches its target."""
    reached = "" if target is None else "MISS" if (value > target if most else value < target) else "pass"
    bound = "" if target is None else f"target {target:g}"
    print(f"{name:<42} {value:10.2f}   {bound:<14} {reached}", flush=True)


def empty(trials: int) -> Recipe:
    """A workload with nothing to do: one step in one dimension."""
    section = {"metric": "train/loss", "trials": trials, "pack": False}
    section["space"] = {"optimizer.lr": {"uniform": [0.01, 1.9]}}
    problem = {"dimension": 1, "condition": 1.0, "steps": 1}
    return running.resolve({"workload": "quadratic", "problem": problem, "sweep": section}, "empty")


def bare_tune(trials: int, at_a_time: int) -> float:
    """Seconds a trial of Tune's own loop: a function that reports once, reused actors, no loggers."""
    from ray import tune
    from ray.tune.progress_reporter import TrialProgressCallback

    moments: list[float] = []

    class Note(TrialProgressCallback):
        def log_result(self, trial: Any, result: Any, error: bool = False) -> None:
            pass

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            moments.append(time.perf_counter())

    def objective(config: dict[str, float]) -> None:
        tune.report({"loss": (config["lr"] - 1.0) ** 2})

    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            tune.with_resources(objective, {"cpu": 1}),
            param_space={"lr": tune.uniform(0.01, 1.9)},
            tune_config=tune.TuneConfig(
                num_samples=trials, max_concurrent_trials=at_a_time, reuse_actors=True
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[Note()]),
        ).fit()
    return (moments[-1] - moments[20]) / (len(moments) - 21)


def on_tune() -> float:
    """The cost of an empty trial against Tune's bare loop, in turn; returns the bare trials/s."""
    ours, bare = [], []
    for _ in range(3):
        clock = Clock()
        sweep(empty(120), fresh=True, observer=clock)
        ours.append(clock.each())
        bare.append(bare_tune(120, 2))
    each, bare_each = statistics.median(ours), statistics.median(bare)
    overhead = 1e3 * statistics.median(a - b for a, b in zip(ours, bare, strict=True))
    figure("empty trials/s on Ray Tune, tracking on", 1 / each, 10)
    figure("bare Ray Tune, trials/s", 1 / bare_each)
    figure("overhead of a trial, ms", overhead, 50, most=True)
    return 1 / bare_each


def packed(trials: int) -> tuple[float, float]:
    """Trials/s of a packed random search, committed, from the call to the last commit; seconds a trial."""
    clock = Clock()
    began = time.perf_counter()
    result = sweep("quadratic-random", local=True, fresh=True, observer=clock, sweep__trials=trials)
    assert len(result.trials) == trials
    assert all(trial.outcome == "finished" for trial in result.trials)
    seconds = clock.ended[-1][0] - began
    return trials / seconds, seconds / trials


def by_optuna(sampler: optuna.samplers.BaseSampler, trials: int) -> float:
    """Trials/s of Optuna in memory on the same objective: 100 steps of gradient descent on the bowl."""
    generator = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(generator.standard_normal((16, 16)))
    matrix = rotation @ np.diag(10.0 ** (np.linspace(0.0, 1.0, 16) - 1.0)) @ rotation.T
    minimum = generator.standard_normal(16)

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("optimizer.lr", 0.01, 2.2)
        offset = -minimum
        for _ in range(100):
            offset = offset - lr * (matrix @ offset)
        return float(0.5 * offset @ matrix @ offset)

    study = optuna.create_study(sampler=sampler)
    began = time.perf_counter()
    study.optimize(objective, n_trials=trials)
    return trials / (time.perf_counter() - began)


def in_packs(bare: float) -> None:
    """Packed trials against Optuna and against Tune's bare loop."""
    rates = []
    random, tpe = [], []
    for _ in range(3):
        rates.append(packed(20_000)[0])
        random.append(by_optuna(optuna.samplers.RandomSampler(seed=0), 2_000))
        tpe.append(by_optuna(optuna.samplers.TPESampler(seed=0), 200))
    rate, by_random, by_tpe = (statistics.median(found) for found in (rates, random, tpe))
    figure("packed trials/s, 20,000 trials", rate, 5000)
    figure("packed / bare Ray Tune", rate / bare, 100)
    figure("Optuna in memory, random sampler, trials/s", by_random)
    figure("packed / Optuna's random sampler", rate / by_random, 1)
    figure("Optuna in memory, TPE sampler, trials/s", by_tpe)


def many() -> None:
    """100,000 trials in one sweep: the driver's memory, and the cost of a trial against that at 1,000."""
    small = statistics.median(packed(1_000)[1] for _ in range(3))
    large = packed(100_000)[1]
    memory = psutil.Process().memory_info().rss / 2**30
    figure("cost of a trial, 100,000 / 1,000", large / small, 1.3, most=True)
    figure("driver's memory, GiB", memory, 2, most=True)


class Stop(Exception):
    """The driver dies."""


class Half(Clock):
    """Ends the driver after so many trials."""

    def __init__(self, trials: int) -> None:
        super().__init__()
        self._trials = trials

    @contextmanager
    def sweep(self, schedule: Schedule) -> Iterator[Tell]:
        with super().sweep(schedule) as tell:

            def stop(event: str, work: Work) -> None:
                tell(event, work)  # type: ignore[arg-type]
                if len(self.ended) >= self._trials:
                    raise Stop

            yield stop


def resume() -> None:
    """From `execute` to the first step of a new trial, of 200 trials of which 100 are done; Ray is up."""
    ledger = open_ledger()
    sweep_id = plan_sweep(ledger, "empty", empty(200))
    with suppress(Stop):
        execute_sweep(ledger, sweep_id, local=False, fresh=True, observer=Half(100))
    done = {trial.run_id for trial in ledger.sweeps.trials(sweep_id) if trial.outcome is not None}
    began = time.time()
    execute_sweep(ledger, resumable_sweep(ledger, sweep_id), local=False, fresh=True)
    new = [t for t in ledger.sweeps.trials(sweep_id) if t.run_id not in done]
    first = min((t.finished or began) - t.seconds for t in new) - began
    figure("resume to the first new trial, s", first, 3, most=True)
    assert len(done) + len(new) == 200


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="piste-bench-") as home:
        os.environ["PISTE_HOME"] = home
        with cluster(Resources()):
            assert tuning.capacity(empty(1).sweep, Resources()) >= 2  # type: ignore[arg-type]
            bare = on_tune()
            resume()
        in_packs(bare)
        many()


if __name__ == "__main__":
    main()
