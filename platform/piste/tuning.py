"""Ray Tune: the trials of a sweep on a cluster.

Tune's searcher is an adapter: what comes next and what came of it is the schedule's to say, and the schedule
has it from the ledger. A trial of one process runs in an actor that the next trial uses again; a trial of
several workers is a function that drives a Ray Train run. A trial's failure is recorded and never Tune's.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Read by Ray when it is imported or started.
for _key, _value in {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the ledger has it all
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is not what a sweep is resumed from
    "TUNE_WARN_THRESHOLD_S": "30",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}.items():
    os.environ.setdefault(_key, _value)

from piste import training

# isort: split
import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from piste import catalog, packing, trial_process
from piste.config import Recipe, Resources, validate
from piste.errors import BadInput, PisteError
from piste.schedule import Schedule
from piste.space import Sweep
from piste.sweeping import Tell
from piste.trial_process import OBJECTIVE, STEP
from piste.trials import Work
from piste.writer import ask, start_writer


def run(schedule: Schedule, tell: Tell, stop: threading.Event) -> None:
    """Executes a sweep on the recipe's cluster, or on a local Ray.

    Args:
        schedule: The sweep.
        tell: Called when work has started or ended.
        stop: Set when no trial is to start any more and the running ones are to end with a checkpoint.

    Raises:
        BadInput: The resources cannot be had.
        PisteError: Tune itself failed.
    """
    resources = schedule.resources
    distributed = resources.workers > 1
    with training.cluster(resources, dashboard=distributed):
        fits = capacity(schedule.section, resources)
        writer = start_writer(schedule.ledger.url)
        searcher = _LedgerSearcher(schedule, writer, tell, stop)
        folder = Path(schedule.ledger.sweeps.get(schedule.sweep_id).directory) / "tune"
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(fits)
        trial = _distributed if distributed else trial_process.compute
        needs = _needs(resources, distributed)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(trial, writer=writer, section=schedule.section), needs),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_scheduler(schedule),
                num_samples=-1,
                max_concurrent_trials=fits,
                # What drives a Ray Train run may leave workers behind, which end with its process.
                reuse_actors=not distributed,
                trial_name_creator=lambda made: made.config["run"],
                trial_dirname_creator=lambda made: made.trial_id,
            ),
            run_config=tune.RunConfig(
                name="session", storage_path=str(folder), verbose=0, callbacks=[_Quiet()]
            ),
        )
        try:
            _fit(tuner, writer, stop)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            ray.kill(writer)  # the cluster may outlive the sweep
        if searcher.failure is not None:
            raise searcher.failure


def capacity(section: Sweep, resources: Resources) -> int:
    """How many trials the connected cluster holds at a time.

    Raises:
        BadInput: None, or fewer than `sweep.concurrency`.
    """
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    each = {
        "CPU": resources.workers * resources.cpus_per_worker,
        "GPU": resources.workers * resources.gpus_per_worker,
    }
    fits = min(math.floor(total.get(kind, 0.0) / amount) for kind, amount in each.items() if amount > 0)
    wanted = section.concurrency or max(fits, 1)
    if wanted > fits:
        kind = min((k for k in each if each[k] > 0), key=lambda k: total.get(k, 0.0) / each[k])
        asked = f"{wanted} trials x {each[kind]:g} {kind}s = {wanted * each[kind]:g} {kind}s"
        raise BadInput(
            f"sweep.concurrency: {asked}, but "
            f"the cluster has {total.get(kind, 0.0):g}: lower it, or the resources of a trial"
        )
    return wanted


def _needs(resources: Resources, distributed: bool) -> dict[str, float]:
    """What Tune reserves for a trial; a driver of a Ray Train run has its workers reserved by that."""
    if distributed:
        return {"memory": 1}  # a byte: Tune refuses to reserve nothing
    gpus = resources.gpus_per_worker
    return {"cpu": resources.cpus_per_worker, **({"gpu": gpus} if gpus else {})}


def _scheduler(schedule: Schedule) -> TrialScheduler:
    section = schedule.section
    if section.scheduler == "asha":
        # Never reached: a trial that comes to its end is to end by itself.
        steps = schedule.total_steps + 1
        return ASHAScheduler(
            time_attr=STEP,
            metric=OBJECTIVE,
            mode=section.mode,
            max_t=steps,
            grace_period=min(section.asha.grace_steps, steps),
            reduction_factor=section.asha.reduction_factor,
        )
    if section.scheduler == "median":
        return MedianStoppingRule(
            time_attr=STEP, metric=OBJECTIVE, mode=section.mode, grace_period=section.asha.grace_steps
        )
    return FIFOScheduler()  # type: ignore[no-untyped-call]


def _fit(tuner: tune.Tuner, writer: Any, stop: threading.Event) -> None:
    """Runs `fit` in a thread, so that this one can be interrupted."""
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=fit, name="piste-tune", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        if stop.is_set():
            writer.stop.remote()  # again and again: it may have been restarted
    if failure:
        raise PisteError(f"Ray Tune: {str(failure[0]).strip().splitlines()[-1]}") from failure[0]


class _Quiet(TrialProgressCallback):
    """Takes the place of Tune's own, which prints a line a trial."""

    def log_result(self, trial: Any, result: Any, error: bool = False) -> None:
        """Nothing."""

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Nothing."""


class _LedgerSearcher(Searcher):
    """Hands Tune what the schedule says.

    Args:
        schedule: The sweep.
        writer: The ledger's writer, which keeps what the trials' processes are told.
        tell: Called when work has started or ended.
        stop: Set when no trial is to start any more.
    """

    def __init__(self, schedule: Schedule, writer: Any, tell: Tell, stop: threading.Event) -> None:
        super().__init__(metric=OBJECTIVE, mode=schedule.section.mode)
        self._schedule = schedule
        self._writer = writer
        self._tell = tell
        self._stop = stop
        self._sizer = packing.PackSizer()
        self._work: dict[str, Work] = {}
        self.failure: Exception | None = None

    def suggest(self, trial_id: str) -> Any:
        """The next trial or pack; None where all that can be suggested now is running."""
        try:
            over = self.failure is not None or self._stop.is_set()
            work = None if over else self._schedule.next(self._sizer.size)
            if work is None:
                return Searcher.FINISHED if over or self._schedule.ended else None
            name = work.trials[0].run_id
            if work.packed:
                ask(self._writer.keep.remote(name, work))
            self._work[trial_id] = work
            self._tell("started", work)
            return {"run": name, "packed": work.packed}
        except Exception as error:
            self.failure = error
            return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Takes note that a trial's process has ended it, or has died."""
        work = self._work.pop(trial_id)
        told = result or {}
        measured = [packing.Measurement(*each) for each in told.get("measured", ())]
        failure = "its process died" if error else told.get("failure")
        try:
            if told.get("forgotten"):
                self._schedule.put_back(work)
            else:
                self._sizer.learn(measured)
                self._schedule.settle(work, failure, sum(each.seconds for each in measured))
            self._tell("ended", work)
        except Exception as broken:
            self.failure = broken

    def __getstate__(self) -> dict[str, Any]:
        """Nothing that Tune would want to keep: the ledger has it."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""


class _Report(TuneReportCallback):
    """Passes the objective of a Ray Train run on to Tune."""

    def __init__(self, objective: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._objective = objective

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray Train's controller with what every rank has reported."""
        if self._objective in metrics[0]:
            value, step = metrics[0][self._objective], metrics[0][STEP]
            super().after_report(run_context, [{OBJECTIVE: value, STEP: step}], None)


def _distributed(trial: Mapping[str, Any], writer: Any, section: Sweep) -> None:
    """A trial of several workers: drives its Ray Train run."""
    name = trial["run"]
    job = ask(writer.job.remote(name))
    os.environ["PISTE_HOME"] = job["home"]
    module = catalog.load_workload(job["config"]["workload"])
    config: Recipe = validate(module.Config, job["config"], name)

    def failed() -> str | None:
        answer: str | None = ask(writer.failure.remote(name))
        return answer

    outcome = training.fit(job, config, writer, failed, callbacks=[_Report(section.metric)])
    failure = None if outcome.stopped else outcome.failure or failed()
    if failure is not None:
        ask(writer.fail.remote(name, failure))
    else:
        trial_process.ended(name, outcome.stopped, writer)
