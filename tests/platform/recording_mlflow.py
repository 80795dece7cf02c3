"""An MLflow server that records, and the client that piste would speak to it with.

It keeps what MLflow keeps and refuses what MLflow refuses; `test_recording_mlflow.py` holds it against the
real one. A request may be lost before it is carried out, or after; come twice, as the client's own retries
make it; come later than the client has waited for; or be carried out in part.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow.exceptions import MlflowException
from tests.platform.simulated import alive, fault, pause

MOST_METRICS, MOST_PARAMS, MOST_TAGS, MOST = 1000, 100, 100, 1000

Request = Callable[[], Any]


class Deleted(MlflowException):
    """A request about a run that was removed."""


class RecordedRun:
    """One run of the server."""

    def __init__(self, run_id: str, experiment: str, start: int, name: str, tags: dict[str, str]) -> None:
        self.run_id, self.experiment, self.start, self.name = run_id, experiment, start, name
        self.tags = dict(tags)
        self.status, self.deleted = "RUNNING", False
        self.end: int | None = None
        self.params: dict[str, str] = {}
        self.metrics: dict[tuple[str, int, float, int], None] = {}  # key, step, value, timestamp
        self.artifacts: dict[str, str] = {}

    def entity(self) -> Any:
        """As the client shows it."""
        return SimpleNamespace(
            info=SimpleNamespace(
                run_id=self.run_id,
                experiment_id=self.experiment,
                status=self.status,
                start_time=self.start,
                end_time=self.end,
                run_name=self.name,
                lifecycle_stage="deleted" if self.deleted else "active",
            ),
            data=SimpleNamespace(tags=dict(self.tags), params=dict(self.params)),
        )


class RecordingServer:
    """What the server has, and the requests that still lie before it."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}  # name -> id
        self.recorded: dict[str, RecordedRun] = {}
        self.late: list[Request] = []
        self.refused: list[str] = []  # what no request is to ask for
        self._numbers = itertools.count(1)

    def of(self, run_id: str) -> list[RecordedRun]:
        """The runs that show one of piste's."""
        return [r for r in self.recorded.values() if r.tags.get("piste.run_id") == run_id and not r.deleted]

    def refuse(self, what: str) -> MlflowException:
        self.refused.append(what)
        return MlflowException(what)

    def run(self, run_id: str) -> RecordedRun:
        if run_id not in self.recorded:
            raise MlflowException(f"Run with id={run_id} not found")
        return self.recorded[run_id]

    def active(self, run_id: str) -> RecordedRun:
        found = self.run(run_id)
        if found.deleted:
            raise Deleted(f"The run {run_id} must be in the 'active' state.")
        return found

    def create_experiment(self, name: str) -> str:
        if name in self.experiments:
            raise MlflowException(f"Experiment '{name}' already exists.")
        self.experiments[name] = str(next(self._numbers))
        return self.experiments[name]

    def create_run(self, experiment: str, start: int, name: str, tags: dict[str, str]) -> RecordedRun:
        made = RecordedRun(f"{next(self._numbers):08x}", experiment, start, name, tags)
        self.recorded[made.run_id] = made
        return made

    def log_metrics(self, run_id: str, metrics: Sequence[Any]) -> None:
        run = self.active(run_id)
        for metric in metrics:
            run.metrics[metric.key, metric.step, metric.value, metric.timestamp] = None

    def log_params(self, run_id: str, params: Sequence[Any]) -> None:
        run = self.active(run_id)
        for param in params:
            if run.params.get(param.key, param.value) != param.value:
                raise self.refuse(f"Changing param values is not allowed: {param.key}")
        run.params |= {param.key: param.value for param in params}

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        self.active(run_id).tags |= tags

    def update(self, run_id: str, status: str, end: int | None) -> None:
        run = self.active(run_id)
        run.status, run.end = status, run.end if end is None else end

    def log_artifact(self, run_id: str, path: str, content: bytes) -> None:
        self.active(run_id).artifacts[path] = hashlib.sha256(content).hexdigest()


class RecordingClient:
    """The part of `mlflow.MlflowClient` that shows runs."""

    def __init__(self, server: RecordingServer) -> None:
        self.server = server
        self._deleted: set[str] = set()  # what it has heard of removed runs

    def _ask(self, *parts: Request, late: bool = False) -> Any:
        """One request; its parts are carried out in their order, each wholly.

        Args:
            parts: What the server is to do.
            late: It may be carried out after requests that were sent after it: what adds, never what
                writes over.
        """
        pause()
        try:
            return self._carried_out(parts, late)
        except Deleted as error:
            if str(error) in self._deleted:
                self.server.refuse(f"asked again: {error}")
            self._deleted.add(str(error))
            raise

    def _carried_out(self, parts: tuple[Request, ...], late: bool) -> Any:
        alive()
        what = fault("before", "after", "twice", "partly", *(["late"] if late else []))
        if what == "before":
            raise ConnectionError("the request was lost")
        if what == "late":
            self.server.late.append(lambda: [part() for part in parts])
            raise TimeoutError("no answer yet")
        if what == "partly":
            for part in parts[:-1]:
                part()
            raise ConnectionError("the server has gone")
        if what == "twice":
            for part in parts:
                part()
        answers = [part() for part in parts]
        if what == "after":
            raise ConnectionError("the answer was lost")
        return answers[-1]

    def get_experiment_by_name(self, name: str) -> Any:
        found = self._ask(lambda: self.server.experiments.get(name))
        return None if found is None else SimpleNamespace(experiment_id=found, name=name)

    def create_experiment(self, name: str, artifact_location: str | None, tags: dict[str, str]) -> str:
        return str(self._ask(lambda: self.server.create_experiment(name), late=True))

    def search_runs(self, experiments: Sequence[str], filter_string: str, max_results: int = 1000) -> Any:
        key, _, value = filter_string.partition(" = ")
        key, value = key.removeprefix("tags.").strip("`"), value.strip("'")

        def search() -> list[Any]:
            found = [r for r in self.server.recorded.values() if r.tags.get(key) == value and not r.deleted]
            found = [r for r in found if r.experiment in experiments]
            return [r.entity() for r in sorted(found, key=lambda r: (-r.start, r.run_id))[:max_results]]

        return self._ask(search)

    def create_run(self, experiment: str, start_time: int, tags: dict[str, str], run_name: str) -> Any:
        return self._ask(
            lambda: self.server.create_run(experiment, start_time, run_name, tags).entity(), late=True
        )

    def get_run(self, run_id: str) -> Any:
        return self._ask(lambda: self.server.run(run_id).entity())

    def delete_run(self, run_id: str) -> None:
        self._ask(lambda: setattr(self.server.run(run_id), "deleted", True))

    def update_run(self, run_id: str, status: str) -> None:
        self._ask(lambda: self.server.update(run_id, status, None))

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self._ask(lambda: self.server.update(run_id, status, end_time))

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self._ask(lambda: self.server.set_tags(run_id, {key: value}))

    def log_batch(
        self, run_id: str, metrics: Sequence[Any] = (), params: Sequence[Any] = (), tags: Sequence[Any] = ()
    ) -> None:
        counts = (len(metrics), len(params), len(tags))
        within = (MOST_METRICS, MOST_PARAMS, MOST_TAGS)
        if any(n > most for n, most in zip(counts, within, strict=True)) or sum(counts) > MOST:
            raise self.server.refuse(
                f"A batch logging request has {counts} of at most {within}, {MOST} in all"
            )
        self._ask(
            lambda: self.server.log_params(run_id, params),
            lambda: self.server.log_metrics(run_id, metrics),
            lambda: self.server.set_tags(run_id, {tag.key: tag.value for tag in tags}),
            late=True,
        )

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        path = Path(local_path)
        name = path.name if artifact_path is None else f"{artifact_path}/{path.name}"
        self._ask(lambda: self.server.log_artifact(run_id, name, path.read_bytes()))

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self._ask(lambda: self.server.log_artifact(run_id, artifact_file, text.encode()))
