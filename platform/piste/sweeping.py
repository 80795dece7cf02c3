"""Sweeps: planned, executed here or on Ray Tune, resumed, extended."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import secrets
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from piste import catalog, packing, provenance, relay_process, tracking
from piste.building import check_optimizer
from piste.config import Recipe, override, validate
from piste.errors import BadInput, PisteError, Terminated, cause
from piste.home import home
from piste.ledger import Ledger, TrialRecord, open_ledger
from piste.ledger import Sweep as SweepRow
from piste.running import ONE_WORKER, load_recipe, make_folder, origin
from piste.schedule import Schedule
from piste.search import suggest, sweep_key
from piste.space import Sweep
from piste.stopping import ASKED, on_terminate
from piste.trials import Work, better, compute_pack

Tell = Callable[[Literal["started", "ended"], Work], None]
# Draws that look for a point where a conditional entry holds.
DRAWS = 20


class SweepObserver(Protocol):
    """Follows a sweep while it computes."""

    def sweep(self, schedule: Schedule) -> AbstractContextManager[Tell]:
        """A context that gives a function to call when work has started or ended."""


class _Silent:
    def sweep(self, schedule: Schedule) -> AbstractContextManager[Tell]:
        return nullcontext(lambda event, work: None)


@dataclass(frozen=True)
class SweepResult:
    """A sweep that has ended.

    Attributes:
        id: The sweep's id.
        status: `finished`, `failed` or `interrupted`.
        reason: Why it ended before all its trials, where it did.
        trials: Its trials in the order of their numbers.
        section: Its `[sweep]`.
        best: The trial with the best objective; None where none finished.
        mlflow_run_id: The MLflow run that shows it; None where the tracking server could not be reached.
        pending: Trials that MLflow still lacks; `piste sync` pushes them.
        directory: The sweep's folder.
    """

    id: str
    status: str
    reason: str | None
    trials: list[TrialRecord]
    section: Sweep
    best: TrialRecord | None
    mlflow_run_id: str | None
    pending: int | None
    directory: Path


def sweep(
    recipe: str | Path | Recipe,
    *,
    local: bool = False,
    fresh: bool = False,
    observer: SweepObserver | None = None,
    **overrides: Any,
) -> SweepResult:
    """Runs a recipe's sweep to its end.

    Args:
        recipe: A name, a path or a loaded recipe with a `[sweep]`.
        local: In this process, one after the other, without Ray.
        fresh: Computes again what an identical finished run has computed.
        observer: Shows progress.
        **overrides: Fields to set; a double underscore stands for the dot (`sweep__trials=24`).

    Raises:
        BadInput: Before anything is recorded.
        PisteError: The sweep failed; it is recorded and can be resumed. A trial that fails does not.
    """
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    dotted |= ONE_WORKER if local else {}
    if isinstance(recipe, Recipe):
        recipe_name, table = recipe.workload, override(recipe.model_dump(), dotted)
        config = validate(type(recipe), table, recipe_name)
    else:
        recipe_name, config = Path(recipe).stem, load_recipe(recipe, dotted)
    ledger = open_ledger()
    return execute_sweep(
        ledger, plan_sweep(ledger, recipe_name, config), local=local, fresh=fresh, observer=observer
    )


def plan_sweep(ledger: Ledger, name: str, config: Recipe) -> str:
    """Checks a sweep and records it as planned; returns its id.

    Raises:
        BadInput: The recipe has no `[sweep]`, or its space has points that no run can start from.
    """
    section = checked_section(name, config)
    tracking.check(tracking.tracking_uri(config.tracking.uri))
    code, data = origin(config)
    sweep_id = f"{name}-sweep-{secrets.token_hex(3)}"
    directory = make_folder(home() / "sweeps" / sweep_id, config)
    ledger.sweeps.create(
        id=sweep_id,
        recipe=name,
        workload=config.workload,
        config=config.model_dump(mode="json"),
        provenance=provenance.collect(code, data),
        directory=str(directory),
        trials=None if section.cells is None else section.cells * section.repeats,
    )
    return sweep_id


def checked_section(name: str, config: Recipe) -> Sweep:
    """The recipe's `[sweep]`, every value of its space tried on the recipe.

    Raises:
        BadInput: There is none, or a value does not fit; the message says which.
    """
    section = config.sweep
    if section is None:
        raise BadInput(f"{name}: no [sweep]: add one, or use `piste run {name}`")
    base = override(config.model_dump(mode="json", exclude={"sweep"}), section.constants)
    key = sweep_key(section, config.seed)
    independent = section.model_copy(update={"searcher": "random", "bisect": None})
    tried = {"": [None]} | {name: _values_to_try(section, name) for name in section.entries}
    for entry, values in tried.items():
        for value in values:
            for draw in range(max(DRAWS, len(independent.strata))):
                point = suggest(independent, key, draw, [])
                assert point is not None
                chosen = {**point.values, **({} if value is None else {entry: value})}
                if (entry == "" or entry in point.values) and section.has(chosen):
                    _check_point(config, override(base, chosen), name, chosen)
                    break
    return section


def _values_to_try(section: Sweep, name: str) -> list[Any]:
    """All values of a finite entry, both ends of a bisected one; else whatever is drawn (None)."""
    entry = section.entries[name]
    if entry.integer is not None or section.searcher == "bisect":
        return list(entry.integer or entry.log_uniform or entry.uniform or entry.finite or ())
    return list(entry.finite or (None,))


def _check_point(config: Recipe, table: Mapping[str, Any], name: str, chosen: Mapping[str, Any]) -> None:
    try:
        check_optimizer(validate(type(config), table, name).optimizer)
    except BadInput as error:
        point = ", ".join(f"{key} = {value}" for key, value in chosen.items())
        raise BadInput(f"{error} (at {point})") from error


def execute_sweep(
    ledger: Ledger,
    sweep_id: str,
    *,
    local: bool,
    fresh: bool = False,
    observer: SweepObserver | None = None,
) -> SweepResult:
    """Runs what a planned or interrupted sweep still lacks, with its relay beside it.

    SIGTERM stops its trials with a checkpoint; it is then `interrupted`.

    Raises:
        PisteError: The sweep failed. KeyboardInterrupt passes through; the sweep is marked interrupted.
        Terminated: A trial has not stopped within `resources.grace_seconds`; it is marked so, too.
    """
    row = ledger.sweeps.get(sweep_id)
    module = catalog.load_workload(row.workload)
    config: Recipe = validate(module.Config, row.config, sweep_id)
    with on_terminate(config.resources.grace_seconds) as stop:
        return _execute(ledger, row, config, local, fresh, observer, stop)


def _execute(
    ledger: Ledger,
    row: SweepRow,
    config: Recipe,
    local: bool,
    fresh: bool,
    observer: SweepObserver | None,
    stop: threading.Event,
) -> SweepResult:
    uri = tracking.tracking_uri(config.tracking.uri)
    ledger.sweeps.claim(row.id, f"{os.uname().nodename}:{os.getpid()}")
    relay = relay_process.RelayProcess(ledger.url, row.id, uri, Path(row.directory) / "relay.log", "sweep")
    schedule = Schedule(ledger, row, fresh)

    def end(status: str, reason: str | None) -> None:
        ledger.sweeps.end(row.id, status, schedule.counts.seconds, reason)

    try:
        with (observer or _Silent()).sweep(schedule) as tell, _rare_collections():
            if local:
                _run_here(schedule, tell, stop)
            else:
                from piste import tuning

                tuning.run(schedule, tell, stop)
        if stop.is_set() and not schedule.ended:
            end("interrupted", ASKED)
        else:
            end("finished", schedule.reason)
    except KeyboardInterrupt as interrupt:
        by = "SIGTERM" if isinstance(interrupt, Terminated) else "the user"
        end("interrupted", f"interrupted by {by}")
        relay.detach()
        raise
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        with suppress(OSError, PisteError):  # on a full disk nothing is recorded; what filled it is told
            (Path(row.directory) / "error.txt").write_text(text, encoding="utf-8")
            end("failed", cause(error))
        relay.finish()
        raise
    return sweep_result(ledger, row.id, relay.finish())


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Python's collector looks through new objects less often: those of a sweep's trials all stay.

    At the usual threshold it goes over them again and again, a third of a packed sweep's time.
    """
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def sweep_result(ledger: Ledger, sweep_id: str, shown: Mapping[str, Any] | None = None) -> SweepResult:
    """What the ledger knows of a sweep."""
    row = ledger.sweeps.get(sweep_id)
    section = Sweep.model_validate(row.config["sweep"])
    trials = ledger.sweeps.trials(row.id)
    best: TrialRecord | None = None
    for trial in trials:
        if trial.outcome == "finished" and better(section, trial.value, best.value if best else None):
            best = trial
    return SweepResult(
        id=row.id,
        status=row.status,
        reason=row.error,
        trials=trials,
        section=section,
        best=best,
        mlflow_run_id=(shown or {}).get("mlflow_run_id"),
        pending=(shown or {}).get("pending"),
        directory=Path(row.directory),
    )


def resume_sweep(
    sweep_id: str,
    *,
    local: bool = False,
    fresh: bool = False,
    extend: int = 0,
    observer: SweepObserver | None = None,
    **overrides: Any,
) -> SweepResult:
    """Runs what a sweep still lacks.

    Args:
        sweep_id: The sweep.
        local: In this process, without Ray.
        fresh: As for `sweep`.
        extend: So many trials more than it was to have.
        observer: Shows progress.
        **overrides: Fields that make its runs longer (`train__steps=240`): finished trials go on from their
            last checkpoint.

    Raises:
        BadInput: It lacks nothing, its driver is alive, or it cannot be extended so.
    """
    ledger = open_ledger()
    longer = {key.replace("__", "."): value for key, value in overrides.items()}
    name = resumable_sweep(ledger, sweep_id, extend, longer)
    return execute_sweep(ledger, name, local=local, fresh=fresh, observer=observer)


def resumable_sweep(
    ledger: Ledger, sweep_id: str, extend: int = 0, longer: Mapping[str, Any] | None = None
) -> str:
    """The full id of a sweep that lacks trials, extended where that is asked for.

    Raises:
        BadInput: It lacks nothing, or cannot be extended so.
    """
    if extend < 0:
        raise BadInput(f"extend = {extend}: a sweep gets no fewer trials than it has")
    row = ledger.sweeps.get(sweep_id)
    model = catalog.load_workload(row.workload).Config
    if longer:
        _lengthen(ledger, row, validate(model, override(row.config, longer), row.id), longer)
    if extend:
        searcher = row.config["sweep"]["searcher"]
        if row.trials is None or searcher == "grid":
            raise BadInput(f"{row.id}: the searcher {searcher!r} decides how many trials there are")
        config = override(ledger.sweeps.get(row.id).config, {"sweep.trials": row.trials + extend})
        validate(model, config, row.id)
        ledger.sweeps.extend(row.id, row.trials + extend, config)
    if row.status == "finished" and not extend and not longer:
        raise BadInput(f"{row.id} has finished: `piste sweep --resume {row.id} --extend N` adds trials")
    return row.id


def _lengthen(ledger: Ledger, row: SweepRow, config: Recipe, longer: Mapping[str, Any]) -> None:
    """Lets the finished trials of a sweep go on with longer recipes.

    Raises:
        BadInput: The recipe does not get longer.
    """
    before = validate(type(config), row.config, row.id)
    steps = [getattr(recipe, "total_steps", None) for recipe in (before, config)]
    if None in steps or steps[1] <= steps[0]:  # type: ignore[operator]
        fields = ", ".join(f"{key} = {value}" for key, value in longer.items())
        raise BadInput(f"{row.id}: {fields} makes its runs no longer: they end at step {steps[0]}")
    runs = []
    for trial in ledger.sweeps.trials(row.id):
        if trial.outcome == "finished" and not trial.reused:
            run = ledger.run(trial.run_id)
            stages = [*run.provenance.get("stages", [steps[0]]), steps[1]]
            # Its last steps saw another recipe than a run that was to be so long from the start.
            identity = hashlib.sha256(f"{run.identity}/{json.dumps(dict(longer))}".encode()).hexdigest()
            changed = {"provenance": {**run.provenance, "stages": stages}, "identity": identity}
            runs.append({"id": run.id, "config": override(run.config, longer), **changed})
    table = config.model_dump(mode="json")
    ledger.sweeps.lengthen(row.id, table, runs)


# -- in this process --------------------------------------------------------------------------------


def _run_here(schedule: Schedule, tell: Tell, stop: threading.Event) -> None:
    """Runs one work after the other until the sweep has ended, or is to stop."""
    sizer = packing.PackSizer()
    while not stop.is_set() and (work := schedule.next(sizer.size)) is not None:
        tell("started", work)
        if work.packed:
            try:
                rows, measured = compute_pack(schedule.section, work)
            except Exception as error:
                schedule.settle(work, cause(error))
            else:
                schedule.ledger.sweeps.record(*rows)
                sizer.learn(measured)
                schedule.settle(work, seconds=sum(each.seconds for each in measured))
        else:
            _run_one(schedule.ledger, work, stop)
            schedule.settle(work)
        tell("ended", work)


def _run_one(ledger: Ledger, work: Work, stop: threading.Event) -> None:
    """One trial's run; what it fails of stands in the ledger."""
    from piste.workload import local_run

    row = ledger.run(work.trials[0].run_id)
    (config,) = work.configs
    assert config is not None
    here = local_run(row.id, config, Path(row.directory), ledger, stop)
    try:
        try:
            catalog.load_workload(row.workload).train(config, here)
        finally:
            here.close()
    except Exception as error:
        ledger.set_status(row.id, "failed", cause(error))
    else:
        ledger.set_status(row.id, "finished" if here.stopped is None else "interrupted", here.stopped)
