"""What the process of a trial executes; it imports little more than Tune, torch and the workload."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune

from piste import catalog
from piste.config import Recipe, validate
from piste.errors import cause
from piste.space import Sweep
from piste.trials import Work, compute_pack
from piste.workload import Run
from piste.writer import ask, transport

OBJECTIVE, STEP = "objective", "step"


class _TuneRun(Run):
    """A workload's `Run` in a trial of one process."""

    objective = ""

    def _exchange(self, metrics: dict[str, float], step: int) -> None:
        if self.objective in metrics:
            tune.report({OBJECTIVE: metrics[self.objective], STEP: step})


def compute(trial: Mapping[str, Any], writer: Any, section: Sweep) -> None:
    """A trial of one process, or a pack; what it fails of stands in the ledger."""
    name = trial["run"]
    pack = ask(writer.pack.remote(name))
    if pack is not None:
        _packed(name, pack, writer, section)
        return
    job = ask(writer.job.remote(name))
    os.environ["PISTE_HOME"] = job["home"]
    try:
        module = catalog.load_workload(job["config"]["workload"])
        config: Recipe = validate(module.Config, job["config"], name)
        attempt = ask(writer.begin_attempt.remote(name))
        send, folder = transport(writer), Path(job["directory"])
        run = _TuneRun(name, config, folder, send, attempt, created=job["created"])
        run.objective = section.metric
        try:
            module.train(config, run)
        finally:
            run.close()
    except Exception as error:
        ask(writer.fail.remote(name, cause(error)))
    else:
        ask(writer.finish.remote(name))


def _packed(name: str, pack: Work, writer: Any, section: Sweep) -> None:
    try:
        rows, measured = compute_pack(section, pack)
        ask(writer.record.remote(name, rows))
        tune.report({"measured": [tuple(each) for each in measured]})
    except Exception as error:
        tune.report({"failure": cause(error)})
