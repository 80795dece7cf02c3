"""The life of a run: planned, running, then finished, failed or interrupted; resumed and repeated."""

from __future__ import annotations

import inspect
import os
import secrets
import threading
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from piste import catalog, provenance, relay_process, tracking
from piste.config import Recipe, override, read_toml, to_toml, validate
from piste.errors import BadInput, PisteError, Terminated, cause, nearest
from piste.home import home
from piste.ledger import WALL_CLOCK, Ledger, open_ledger
from piste.ledger import Run as RunRow
from piste.stopping import ASKED, on_terminate

ONE_WORKER = {"resources.workers": 1}  # what `local` sets


class Observer(Protocol):
    """Follows a run while it computes."""

    def watch(self, ledger: Ledger, run_id: str, config: Recipe) -> AbstractContextManager[None]:
        """A context in which the run's new metrics are shown."""


class _Silent:
    def watch(self, ledger: Ledger, run_id: str, config: Recipe) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class RunResult:
    """A run that has ended.

    Attributes:
        id: The run's id.
        status: `finished`, `failed` or `interrupted`.
        metrics: Each metric's last value.
        artifacts: The run's files by name (`samples.json`, `step-000000300`).
        mlflow_run_id: The MLflow run that shows it; None where the tracking server could not be reached.
        mlflow_experiment_id: The experiment of that run.
        pending: Metrics and files that MLflow still lacks; `piste sync` pushes them.
        directory: The run's folder.
    """

    id: str
    status: str
    metrics: dict[str, float]
    artifacts: dict[str, Path]
    mlflow_run_id: str | None
    mlflow_experiment_id: str | None
    pending: int | None
    directory: Path
    _ledger: Ledger = field(repr=False)

    def history(self, key: str) -> list[tuple[int, float]]:
        """All values of one metric as `(step, value)`."""
        return self._ledger.history(self.id, key)


def load_recipe(path_or_name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads, overrides and validates a recipe.

    Args:
        path_or_name: A TOML file, or the name of a recipe that the catalog knows.
        overrides: Dotted keys and values, such as `{"optimizer.lr": 3e-3}`.

    Returns:
        The workload's frozen `Config`.

    Raises:
        BadInput: What is wrong, on one line.
    """
    path = catalog.recipe_path(path_or_name)
    return resolve(override(read_toml(path), overrides or {}), str(path_or_name))


def resolve(table: Mapping[str, Any], source: str) -> Recipe:
    """Validates a recipe's table against its workload and builds its optimizer once for a trial.

    Raises:
        BadInput: What is wrong, on one line.
    """
    from piste.building import check_optimizer

    module = catalog.load_workload(catalog.recipe_workload(dict(table), source))
    config: Recipe = validate(module.Config, _with_defaults(module.Config, table), source)
    check_optimizer(config.optimizer)
    return config


def _with_defaults(model: type[Recipe], table: Mapping[str, Any]) -> dict[str, Any]:
    """The table, its sections completed with what the workload's own defaults set.

    `[optimizer]` with a name is another optimizer, and nothing of the workload's is added to it.
    """
    result = dict(table)
    for key, field_info in model.model_fields.items():
        given, default = table.get(key), field_info.default
        another = key == "optimizer" and isinstance(given, Mapping) and "name" in given
        if isinstance(given, Mapping) and isinstance(default, BaseModel) and not another:
            result[key] = {**default.model_dump(exclude_unset=True), **given}
    return result


def run(
    recipe: str | Path | Recipe, *, local: bool = False, observer: Observer | None = None, **overrides: Any
) -> RunResult:
    """Runs a recipe to its end.

    Args:
        recipe: A name, a path or a loaded recipe.
        local: In this process, without Ray: one worker.
        observer: Shows progress.
        **overrides: Fields to set; a double underscore stands for the dot (`optimizer__lr=3e-3`).

    Raises:
        BadInput: Before anything is recorded.
        PisteError: The run failed; it is recorded and can be resumed.
    """
    dotted = {key.replace("__", "."): value for key, value in overrides.items()} | (
        ONE_WORKER if local else {}
    )
    if isinstance(recipe, Recipe):
        name, config = recipe.workload, resolve(override(recipe.model_dump(), dotted), recipe.workload)
    else:
        name, config = Path(recipe).stem, load_recipe(recipe, dotted)
    ledger = open_ledger()
    return execute(ledger, plan(ledger, name, config), local=local, observer=observer)


def plan(
    ledger: Ledger, name: str, config: Recipe, *, run_id: str | None = None, kind: str | None = None
) -> str:
    """Prepares the data and records a run as planned; returns its id.

    Args:
        ledger: The ledger.
        name: The recipe's name.
        config: The recipe.
        run_id: The run's id; none: a new one.
        kind: What carries it out, where that is not training.

    Raises:
        BadInput: The data, the tracking URI or the resources cannot serve this recipe.
    """
    tracking.check(tracking.tracking_uri(config.tracking.uri))
    code, data = origin(config)
    table = config.model_dump(mode="json")
    identity, cell = provenance.identify(table, code, data)
    run_id = run_id or f"{name}-{secrets.token_hex(3)}"
    directory = make_folder(home() / "runs" / run_id, config)
    ledger.create(
        id=run_id,
        recipe=name,
        workload=config.workload,
        seed=config.seed,
        config=table,
        provenance=provenance.collect(code, data) | ({"kind": kind} if kind is not None else {}),
        identity=identity,
        cell=cell,
        directory=str(directory),
    )
    return run_id


def origin(config: Recipe) -> tuple[str, str]:
    """The version of a recipe's code and the hash of its data, which is prepared.

    Raises:
        BadInput: The data cannot be prepared.
    """
    module = catalog.load_workload(config.workload)
    data = module.prepare_data(config) if hasattr(module, "prepare_data") else ""
    return provenance.code_version(provenance.code_packages(config)), data


def make_folder(directory: Path, config: Recipe) -> Path:
    """Makes the folder of a run or sweep, with its resolved recipe.

    Raises:
        BadInput: It is there, or cannot be written.
    """
    try:
        directory.mkdir(parents=True)
        (directory / "recipe.toml").write_text(to_toml(config), encoding="utf-8")
    except FileExistsError:
        raise BadInput(
            f"{directory} is there, but {directory.name} is not in the ledger in use: give another name, or "
            "set PISTE_LEDGER to the ledger that has it"
        ) from None
    except OSError as error:
        raise BadInput(
            f"{directory}: {error.strerror}: set PISTE_HOME to a place that can be written"
        ) from None
    return directory


def execute(ledger: Ledger, run_id: str, *, local: bool, observer: Observer | None = None) -> RunResult:
    """Runs the next attempt of a planned or ended run, with its relay beside it.

    SIGTERM stops it with a checkpoint; it is then `interrupted`.

    Raises:
        PisteError: The run failed. KeyboardInterrupt passes through; the run is marked interrupted.
        Terminated: It has not stopped within `resources.grace_seconds`; it is marked so, too.
    """
    row = ledger.run(run_id)
    config = resolve(row.config, run_id)
    with on_terminate(config.resources.grace_seconds) as stop:
        return _execute(ledger, row, config, local, observer, stop)


def _execute(
    ledger: Ledger,
    row: RunRow,
    config: Recipe,
    local: bool,
    observer: Observer | None,
    stop: threading.Event,
) -> RunResult:
    run_id, directory = row.id, Path(row.directory)
    uri = tracking.tracking_uri(config.tracking.uri)
    ledger.claim(run_id, f"{os.uname().nodename}:{os.getpid()}")
    relay = relay_process.RelayProcess(ledger.url, run_id, uri, directory / "relay.log")
    try:
        with (observer or _Silent()).watch(ledger, run_id, config):
            if row.is_stream:
                from piste import shards, streams

                assert isinstance(config, shards.StreamRecipe)
                stopped = streams.execute(ledger, run_id, config, stop, local)
            elif local:
                stopped = _train_here(ledger, run_id, config, directory, stop)
            else:
                from piste import training

                stopped = training.train(ledger, run_id, config, stop)
        if stopped:
            ledger.set_status(run_id, "interrupted", ASKED)
        else:
            ledger.set_status(run_id, "finished")
    except KeyboardInterrupt as interrupt:
        by = "SIGTERM" if isinstance(interrupt, Terminated) else "the user"
        ledger.set_status(run_id, "interrupted", f"interrupted by {by}")
        relay.detach()
        raise
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        with suppress(OSError, PisteError):  # on a full disk nothing is recorded; what filled it is told
            (directory / "error.txt").write_text(text, encoding="utf-8")
            ledger.set_status(run_id, "failed", cause(error))
        relay.finish()
        raise
    return result(ledger, run_id, relay.finish())


def _train_here(ledger: Ledger, run_id: str, config: Recipe, directory: Path, stop: threading.Event) -> bool:
    """Trains in this process; returns whether the run has ended early because it was to."""
    from piste.workload import local_run

    module = catalog.load_workload(config.workload)
    here = local_run(run_id, config, directory, ledger, stop)
    try:
        module.train(config, here)
    finally:
        here.close()
    return here.stopped is not None


def result(ledger: Ledger, run_id: str, shown: Mapping[str, Any] | None = None) -> RunResult:
    """What the ledger knows of a run."""
    row = ledger.run(run_id)
    return RunResult(
        id=row.id,
        status=row.status,
        metrics=ledger.last_values(row.id),
        artifacts={a.name: Path(a.uri) for a in ledger.artifacts(row.id) if Path(a.uri).exists()},
        mlflow_run_id=(shown or {}).get("mlflow_run_id"),
        mlflow_experiment_id=(shown or {}).get("mlflow_experiment_id"),
        pending=(shown or {}).get("pending"),
        directory=Path(row.directory),
        _ledger=ledger,
    )


def log_lines(ledger: Ledger, run_id: str) -> list[str]:
    """What the platform has had to say of a run, as of a damaged checkpoint; in the order of its saying."""
    try:
        text = (Path(ledger.run(run_id).directory) / "artifacts" / "log.txt").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return text.splitlines()


def resume(run_id: str, *, local: bool = False, observer: Observer | None = None) -> RunResult:
    """Continues a run from its last checkpoint, bit for bit where the worker count is the same.

    Raises:
        BadInput: It has finished already, or its driver is alive.
    """
    ledger = open_ledger()
    return execute(ledger, resumable(ledger, run_id, local), local=local, observer=observer)


def resumable(ledger: Ledger, run_id: str, local: bool) -> str:
    """The full id of a run that can be continued.

    Raises:
        BadInput: It has finished already, or needs more workers than `--local` has.
    """
    row = ledger.run(run_id)
    if row.status == "finished":
        raise BadInput(f"{row.id} has finished: `piste rerun {row.id}` repeats it")
    _check_workers(row, local)
    return row.id


def _check_workers(row: RunRow, local: bool) -> None:
    workers = row.config["resources"]["workers"]
    if local and workers > 1:
        raise BadInput(f"{row.id} has {workers} workers: --local has one, leave it out")


@dataclass(frozen=True)
class Difference:
    """How a repeated run compares with the first.

    Attributes:
        first: The run that was repeated.
        second: The repetition.
        metrics: Per metric the largest absolute difference over all steps; infinite where one run lacks
            a step that the other has. Measurements of the machine (`time/`, `system/`) are left out.
        changed: What is not as it was: `code`, `data`, a library.
    """

    first: str
    second: RunResult
    metrics: dict[str, float]
    changed: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest difference of all; 0.0 where the repetition is bit for bit."""
        return max(self.metrics.values(), default=0.0)


def rerun(run_id: str, *, local: bool = False, observer: Observer | None = None) -> Difference:
    """Repeats a run from its stored recipe and compares every number.

    Raises:
        BadInput: The stored recipe no longer fits this code, or needs more workers than `--local` has.
    """
    ledger = open_ledger()
    first = ledger.run(run_id)
    _check_workers(first, local)
    config = resolve(first.config, first.id)
    second = ledger.run(plan(ledger, first.recipe, config, kind=first.provenance.get("kind")))
    changed = _changed(first, second)
    outcome = execute(ledger, second.id, local=local, observer=observer)
    return Difference(first.id, outcome, difference(ledger, first.id, second.id), changed)


def _changed(first: RunRow, second: RunRow) -> tuple[str, ...]:
    before, now = first.provenance, second.provenance
    changed = [name for name in ("code_version", "data_hash", "python") if before.get(name) != now.get(name)]
    libraries = before.get("libraries", {})
    changed += [
        f"{n} {libraries.get(n)} -> {v}" for n, v in now["libraries"].items() if libraries.get(n) != v
    ]
    return tuple(changed)


def difference(ledger: Ledger, first: str, second: str) -> dict[str, float]:
    """Per metric the largest absolute difference of two runs over all steps."""
    keys = {key for run_id in (first, second) for key in ledger.keys(run_id)}
    # What a detector that watched a run has told of it is not the run's own.
    told = () if ledger.run(first).is_stream else (tracking.ALARM,)
    found = {}
    for key in sorted(k for k in keys if not k.startswith((*WALL_CLOCK, *told))):
        a, b = dict(ledger.history(first, key)), dict(ledger.history(second, key))
        same = a.keys() == b.keys()
        found[key] = max((_distance(a[s], b[s]) for s in a), default=0.0) if same else float("inf")
    return found


def _distance(a: float, b: float) -> float:
    if a == b or (a != a and b != b):  # equal, or both NaN
        return 0.0
    gap = abs(a - b)
    return gap if gap == gap else float("inf")


def call(run_id: str, verb: str, **options: Any) -> Any:
    """Asks a run that has a checkpoint: `call("llm-reg-1a2b3c", "sample", prompt="In the")`.

    Raises:
        BadInput: The workload has no such verb, the verb no such option, or the run no checkpoint.
    """
    row = open_ledger().run(run_id)
    from piste.checkpoints import CheckpointStore

    module = catalog.load_workload(row.workload)
    verbs = getattr(module, "verbs", {})
    if verb not in verbs:
        raise BadInput(f"workload {row.workload!r} has no verb {verb!r}{nearest(verb, verbs)}")
    accepted = list(inspect.signature(verbs[verb]).parameters)[2:]
    for key in options:
        if key not in accepted:
            raise BadInput(f"{verb} takes no {key!r}{nearest(key, accepted)}")
    store = CheckpointStore(Path(row.directory) / "checkpoints")
    if not store.steps():
        raise BadInput(f"{row.id} has no checkpoint yet: `piste resume {row.id}` takes it further")
    return verbs[verb](resolve(row.config, row.id), store.path(store.steps()[-1]), **options)
