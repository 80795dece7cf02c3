"""The recording client against MLflow's own: what one keeps, refuses and finds, the other does too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from tests.platform.recording_mlflow import RecordingClient, RecordingServer

from piste.tracking import client

pytest_plugins = ["tests.platform.fixtures"]

FILTER = "tags.`piste.run_id` = 'it'"
Answer = Any


@pytest.fixture
def both(shown_home: Path) -> list[Any]:
    return [client(f"sqlite:///{shown_home / 'mlflow.db'}"), RecordingClient(RecordingServer())]


def refused(request: Callable[[], object]) -> bool:
    try:
        request()
    except MlflowException:
        return True
    return False


def history(view: Any) -> list[Answer]:
    """All that the relay asks of a client, and what comes of it; identifiers are left out."""
    seen: list[Answer] = [view.get_experiment_by_name("hills")]
    experiment = view.create_experiment("hills", artifact_location=None, tags={})
    seen.append(refused(lambda: view.create_experiment("hills", artifact_location=None, tags={})))
    seen.append(view.get_experiment_by_name("hills").experiment_id == experiment)
    seen.append(list(view.search_runs([experiment], FILTER)))
    first = view.create_run(experiment, 1000, {"piste.run_id": "it"}, run_name="it").info.run_id
    other = view.create_run(experiment, 2000, {"piste.run_id": "another"}, run_name="another").info.run_id
    [found] = view.search_runs([experiment], FILTER)
    seen.append((found.info.run_id == first, found.info.run_name, found.info.status, found.info.end_time))

    view.log_batch(first, params=[Param("lr", "0.1"), Param("seed", "3")])
    view.log_batch(first, params=[Param("lr", "0.1")])
    seen.append(refused(lambda: view.log_batch(first, params=[Param("lr", "0.2")])))
    rows = [Metric("loss", 0.5, 10, 1), Metric("loss", 0.25, 20, 2)]
    for _ in range(2):
        view.log_batch(first, metrics=rows, tags=[RunTag("mark", "2")])
    view.log_batch(first, metrics=[Metric("loss", 0.25, 21, 2)])  # another timestamp: it is there twice
    seen.append(sorted(metrics_of(view, first)))
    seen.append(metrics_of(view, other))

    for end in (5000, 6000):
        view.set_terminated(first, "FAILED", end)
        view.set_tag(first, "mark", str(end))
    view.update_run(first, status="RUNNING")
    run = view.get_run(first)
    seen.append((run.info.status, run.info.end_time, run.data.params, run.data.tags["mark"]))
    view.delete_run(first)
    seen.append(list(view.search_runs([experiment], FILTER)))
    seen.append(view.get_run(first).info.lifecycle_stage)
    seen += [refused(act) for act in (
        lambda: view.log_batch(first, metrics=rows),
        lambda: view.log_batch(first, params=[Param("seed", "3")]),
        lambda: view.set_tag(first, "mark", "1"),
        lambda: view.update_run(first, status="RUNNING"),
        lambda: view.set_terminated(first, "FINISHED", 7000),
        lambda: view.get_run("0" * 32),
    )]  # fmt: skip
    return seen


def metrics_of(view: Any, run_id: str) -> list[tuple[str, int, float, int]]:
    if isinstance(view, RecordingClient):
        return list(view.server.recorded[run_id].metrics)
    return [(m.key, m.step, m.value, m.timestamp) for m in view.get_metric_history(run_id, "loss")]


def test_both_clients_do_the_same(both: list[Any]) -> None:
    real, recording = (history(view) for view in both)
    assert recording == real


@pytest.mark.parametrize("counts", [(1001, 0, 0), (0, 101, 0), (0, 0, 101), (998, 1, 2)])
def test_a_request_that_is_too_large_for_mlflow_is_refused(counts: tuple[int, int, int]) -> None:
    from mlflow.utils.validation import _validate_batch_log_limits

    made: tuple[Callable[[int], Any], ...] = (
        lambda n: Metric("x", 0.0, 0, n),
        lambda n: Param(f"p{n}", "1"),
        lambda n: RunTag(f"t{n}", "1"),
    )
    metrics, params, tags = (
        [make(n) for n in range(count)] for make, count in zip(made, counts, strict=True)
    )
    server = RecordingServer()
    with pytest.raises(MlflowException):
        _validate_batch_log_limits(metrics, params, tags)  # type: ignore[no-untyped-call]
    with pytest.raises(MlflowException):
        RecordingClient(server).log_batch("it", metrics, params, tags)
    assert len(server.refused) == 1
