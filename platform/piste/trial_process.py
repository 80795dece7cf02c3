"""What the process of a trial executes; it imports little more than Tune, torch and the workload."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune

from piste import catalog
from piste.config import Recipe, validate
from piste.errors import PisteError, cause
from piste.space import Sweep
from piste.stopping import LOST, PREEMPTED
from piste.trials import Work, compute_pack
from piste.workload import Run
from piste.writer import ask, listener, transport

OBJECTIVE, STEP = "objective", "step"


class Preempted(Exception):
    """Raised to end a process that is not to compute another trial, as its host is being taken away."""


class _TuneRun(Run):
    """A workload's `Run` in a trial of one process."""

    objective = ""

    def _exchange(self, metrics: dict[str, float], step: int) -> None:
        if self.objective in metrics and self.stopped is None:  # nothing is decided on where it was cut
            tune.report({OBJECTIVE: metrics[self.objective], STEP: step})


def compute(trial: Mapping[str, Any], writer: Any, section: Sweep) -> None:
    """A trial of one process, or a pack; what it fails of stands in the ledger."""
    name = trial["run"]
    if trial["packed"]:
        _packed(name, writer, section)
        return
    job = ask(writer.job.remote(name))
    os.environ["PISTE_HOME"] = job["home"]
    try:
        module = catalog.load_workload(job["config"]["workload"])
        config: Recipe = validate(module.Config, job["config"], name)
        attempt = ask(writer.begin_attempt.remote(name))
        send, folder = transport(writer), Path(job["directory"])
        told = listener(writer, name, attempt, [ray.get_runtime_context().get_node_id()])
        run = _TuneRun(name, config, folder, send, attempt, created=job["created"], told=told)
        run.objective = section.metric
        try:
            module.train(config, run)
        finally:
            run.close()
    except Exception as error:
        ask(writer.fail.remote(name, cause(error)))
    else:
        ended(name, run.stopped, writer)


def ended(name: str, stopped: str | None, writer: Any) -> None:
    """Records how a trial's run has ended.

    Raises:
        Preempted: It was stopped because this process is to end.
        PisteError: Whoever computed it is lost; the run may go on.
    """
    if stopped == LOST:
        raise PisteError(LOST)
    ask(writer.finish.remote(name) if stopped is None else writer.interrupt.remote(name, stopped))
    if stopped == PREEMPTED:
        raise Preempted


def _packed(name: str, writer: Any, section: Sweep) -> None:
    pack: Work | None = ask(writer.pack.remote(name))
    if pack is None:  # the writer has been restarted
        tune.report({"forgotten": True})
        return
    try:
        rows, measured = compute_pack(section, pack)
        ask(writer.record.remote(name, rows))
        tune.report({"measured": [tuple(each) for each in measured]})
    except Exception as error:
        tune.report({"failure": cause(error)})
