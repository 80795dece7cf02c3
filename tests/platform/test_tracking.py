"""The relay against real MLflow stores: every metric once, whatever is cut, and all that describes a run."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.platform.driving import end_server, free_port, start_server, wait_until

from piste import relay_process, tracking
from piste.buffer import MetricBuffer
from piste.config import Recipe, to_toml
from piste.errors import BadInput
from piste.ledger import Ledger, Message, Row
from piste.provenance import collect
from piste.tracking import Relay, check, client, find_run, sync


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables made, which takes seconds; tests copy it."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(migrated_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(migrated_store, tmp_path / "mlflow.db"))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")


def record(ledger: Ledger, tmp_path: Path, run_id: str, uri: str, rows: tuple[Row, ...] = ()) -> None:
    """Records a running run with all that a real one has."""
    recipe = Recipe.model_validate(
        {
            "workload": "quadratic",
            "seed": 3,
            "optimizer": {"name": "sgd", "lr": 0.25, "betas": [0.5, 0.9]},
            "tracking": {"uri": uri, "experiment": "hills & valleys"},
        }
    )
    directory = tmp_path / "runs" / run_id
    directory.mkdir(parents=True)
    (directory / "recipe.toml").write_text(to_toml(recipe))
    ledger.create(
        id=run_id,
        recipe="bowl",
        workload="quadratic",
        seed=3,
        config=recipe.model_dump(mode="json"),
        provenance=collect("the-code", "the-data"),
        identity="the-identity",
        cell="the-cell",
        directory=str(directory),
    )
    ledger.begin_attempt(run_id)
    for start in range(0, len(rows), 1000):
        ledger.apply(Message(run_id, 1, start, rows[start : start + 1000]))


def some_rows(count: int) -> tuple[Row, ...]:
    return tuple(Row(("loss", "norm")[n % 2], n // 2, n / 7, 1_700_000_000_000 + n) for n in range(count))


def shown(store: Path, run_id: str) -> list[tuple[Any, ...]]:
    """All metrics in MLflow's own table, sorted, doubles included."""
    plain = sqlite3.connect(store)
    query = "select run_uuid from tags where key = 'piste.run_id' and value = ?"
    runs = plain.execute(query, (run_id,)).fetchall()
    assert len(runs) == 1, "the run is shown once"
    found = plain.execute(
        "select key, step, value, timestamp from metrics where run_uuid = ?", runs[0]
    ).fetchall()
    plain.close()
    return sorted(found)


def tags_of(uri: str, run_id: str) -> dict[str, str]:
    found = find_run(uri, run_id)
    assert found is not None
    return dict(client(uri).get_run(found[1]).data.tags)


def test_a_run_is_shown_whole_and_described(ledger: Ledger, store: Path, tmp_path: Path) -> None:
    uri, rows = f"sqlite:///{store}", some_rows(2100)
    record(ledger, tmp_path, "run-1", uri, rows)
    files: dict[str, str] = {}
    for kind, name in (("figure", "loss.png"), ("figure", "deep/er.png"), ("table", "values.json")):
        path = tmp_path / "runs" / "run-1" / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files.setdefault(name, f'{{"columns": [], "data": [], "name": "{name}"}}'))
        columns = {"kind": kind, "name": name, "uri": str(path), "sha256": name, "size": 1, "step": None}
        ledger.apply(Message("run-1", 1, 0, (), (columns,)))
    hidden = {"kind": "checkpoint", "name": "c", "uri": "/nowhere", "sha256": "", "size": 1, "step": 1}
    ledger.apply(Message("run-1", 1, 0, (), (hidden,)))
    relay = Relay(ledger, "run-1", uri)
    assert relay.pending() == 2100 + len(files)
    assert relay.step() is False
    ledger.set_status("run-1", "finished")
    assert relay.step() is True
    assert relay.pending() == 0
    assert shown(store, "run-1") == sorted(rows)

    assert relay.mlflow_run_id is not None
    view = client(uri)
    run = view.get_run(relay.mlflow_run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run-1")
    assert view.get_experiment(run.info.experiment_id).name == "hills & valleys"
    assert run.data.params["optimizer.lr"] == "0.25"
    assert run.data.params["optimizer.betas"] == "[0.5, 0.9]"
    assert run.data.params["seed"] == "3"
    assert not [key for key in run.data.params if key.startswith("tracking")]
    tags = run.data.tags
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    expected = {
        "piste.run_id": "run-1",
        "piste.recipe": "bowl",
        "piste.workload": "quadratic",
        "piste.identity": "the-identity",
        "piste.cell": "the-cell",
        "piste.code_version": "the-code",
        "piste.data_hash": "the-data",
        "piste.status": "finished",
        "piste.attempts": "1",
        "piste.recomputed_different": "0",
        "mlflow.source.git.commit": commit,
        "version.torch": __import__("torch").__version__,
        "version.mlflow": __import__("mlflow").__version__,
    }
    assert {key: tags.get(key) for key in expected if expected[key]} == {
        k: v for k, v in expected.items() if v
    }
    assert f"{os.cpu_count()} cores" in tags["piste.hardware"]
    if commit:
        assert tags["piste.git.dirty"] in {"True", "False"}
    assert "`piste rerun run-1`" in tags["mlflow.note.content"]
    assert "lr=0.25" in tags["mlflow.note.content"]
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "values.json", "type": "table"}]

    fetched = tmp_path / "fetched"
    fetched.mkdir()
    view.download_artifacts(relay.mlflow_run_id, "", str(fetched))
    for name, text in files.items():
        assert (fetched / name).read_text() == text
    assert (fetched / "recipe.toml").read_text() == (tmp_path / "runs/run-1/recipe.toml").read_text()
    assert f"torch=={expected['version.torch']}" in (fetched / "environment.txt").read_text().splitlines()
    assert json.loads((fetched / "provenance.json").read_text())["data_hash"] == "the-data"


def test_pushing_again_doubles_nothing(ledger: Ledger, store: Path, tmp_path: Path) -> None:
    uri, rows = f"sqlite:///{store}", some_rows(300)
    record(ledger, tmp_path, "run-1", uri, rows)
    first = Relay(ledger, "run-1", uri)
    first.step()
    assert first.mlflow_run_id is not None
    assert tags_of(uri, "run-1")[tracking.MARK] == str(ledger.metrics_after("run-1", 0, 300)[-1].id)
    client(uri).set_tag(first.mlflow_run_id, tracking.MARK, "0")
    again = Relay(ledger, "run-1", uri)
    again.step()
    assert again.mlflow_run_id == first.mlflow_run_id
    assert shown(store, "run-1") == sorted(rows)
    ledger.apply(Message("run-1", 1, 1, (Row("late", 9, 1.0, 5),)))
    again.step()
    assert shown(store, "run-1") == sorted([*rows, Row("late", 9, 1.0, 5)])


def test_a_relay_that_is_cut_anywhere_goes_on(
    ledger: Ledger, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other request to the store fails, before or after it has been carried out."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri, rows = f"sqlite:///{store}", some_rows(2100)
    record(ledger, tmp_path, "run-1", uri, rows)
    ledger.set_status("run-1", "finished")
    whole: Callable[..., None] = SqlAlchemyStore.log_batch
    calls = [0]

    def faulty(self: Any, *arguments: Any, **named: Any) -> None:
        calls[0] += 1
        if calls[0] % 4 == 1:
            raise ConnectionError("cut before")
        whole(self, *arguments, **named)
        if calls[0] % 4 == 3:
            raise ConnectionError("cut after")

    monkeypatch.setattr(SqlAlchemyStore, "log_batch", faulty)
    cuts = 0
    for _ in range(20):
        try:
            if Relay(ledger, "run-1", uri).step():
                break
        except ConnectionError:
            cuts += 1
    assert cuts >= 3
    monkeypatch.undo()
    assert shown(store, "run-1") == sorted(rows)
    found = find_run(uri, "run-1")
    assert found is not None
    run = client(uri).get_run(found[1])
    assert run.data.params["optimizer.name"] == "sgd"
    assert {f.path for f in client(uri).list_artifacts(found[1])} >= {"recipe.toml", "environment.txt"}
    assert run.info.status == "FINISHED"


def test_the_mark_never_runs_ahead_of_the_rows(
    ledger: Ledger, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every single request, the rows up to the mark are in MLflow's table."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri = f"sqlite:///{store}"
    rows = (*some_rows(2100), Row("loss", 10**6, math.nan, 1))
    record(ledger, tmp_path, "run-1", uri, rows)
    place = {m.id: n for n, m in enumerate(ledger.metrics_after("run-1", 0, 10**6), start=1)}
    whole: Callable[..., None] = SqlAlchemyStore.log_batch
    seen = []

    def watched(self: Any, *arguments: Any, **named: Any) -> None:
        whole(self, *arguments, **named)
        mark = int(tags_of(uri, "run-1").get(tracking.MARK, 0))
        seen.append((len(shown(store, "run-1")), place.get(mark, 0)))

    monkeypatch.setattr(SqlAlchemyStore, "log_batch", watched)
    Relay(ledger, "run-1", uri).step()
    assert seen[-1] == (2101, 2101)
    assert all(present >= marked for present, marked in seen), seen


def test_values_that_are_not_finite_are_marked(ledger: Ledger, store: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{store}"
    rows = (Row("loss", 1, 0.5, 10), Row("loss", 2, math.nan, 20), Row("norm", 2, -math.inf, 30))
    record(ledger, tmp_path, "run-1", uri, rows)
    Relay(ledger, "run-1", uri).step()
    marks = [("nonfinite/loss", 2, 1.0, 20), ("nonfinite/norm", 2, 1.0, 30)]
    assert shown(store, "run-1") == [("loss", 1, 0.5, 10), *marks]
    assert tags_of(uri, "run-1")["piste.nonfinite"] == "norm = -inf at 2"


@pytest.mark.parametrize(
    ("status", "view"), [("finished", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED")]
)
def test_how_a_run_ended_is_shown(
    ledger: Ledger, store: Path, tmp_path: Path, status: str, view: str
) -> None:
    uri = f"sqlite:///{store}"
    record(ledger, tmp_path, "run-1", uri)
    relay = Relay(ledger, "run-1", uri)
    relay.step()
    assert relay.mlflow_run_id is not None
    assert client(uri).get_run(relay.mlflow_run_id).info.status == "RUNNING"
    ledger.set_status("run-1", status, "it fell" if status == "failed" else None)
    relay.step()
    run = client(uri).get_run(relay.mlflow_run_id)
    assert run.info.status == view
    finished = ledger.run("run-1").finished
    assert finished is not None
    assert run.info.end_time == int(finished * 1000)
    assert run.data.tags.get("piste.error", "") == ("it fell" if status == "failed" else "")
    if status != "finished":  # a resumed run is running again
        ledger.begin_attempt("run-1")
        relay.step()
        assert client(uri).get_run(relay.mlflow_run_id).info.status == "RUNNING"


def test_sync_pushes_what_is_pending(
    ledger: Ledger, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{store}"
    for run_id, count in (("run-1", 5), ("run-2", 7)):
        record(ledger, tmp_path, run_id, uri, some_rows(count))
        ledger.set_status(run_id, "finished")
    assert find_run(uri, "run-1") is None
    assert sync(ledger, [("run", "run-1"), ("run", "run-2")]) == {"run-1": 0, "run-2": 0}
    assert [len(shown(store, run_id)) for run_id in ("run-1", "run-2")] == [5, 7]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("what is shown whole is not shown again")

    from mlflow import MlflowClient

    with monkeypatch.context() as patch:
        for method in ("log_batch", "log_artifact", "set_tag", "set_terminated"):
            patch.setattr(MlflowClient, method, refuse)
        assert sync(ledger, [("run", "run-1"), ("run", "run-2")]) == {"run-1": 0, "run-2": 0}
    ledger.apply(Message("run-1", 1, 1, (Row("late", 9, 1.0, 5),)))
    assert sync(ledger, [("run", "run-1")]) == {"run-1": 0}
    assert len(shown(store, "run-1")) == 6
    ledger.begin_attempt("run-1")
    ledger.set_status("run-1", "failed", "it fell")
    sync(ledger, [("run", "run-1")])
    assert tags_of(uri, "run-1")["piste.status"] == "failed"


@given(key=st.text(st.characters(codec="utf-8"), max_size=12) | st.text("./ :-_a", max_size=8))
def test_any_metrics_name_is_one_that_mlflow_takes(key: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(tracking.metric_name(key))  # type: ignore[no-untyped-call]


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("train/loss", "time/step seconds", "a.b-c_d:e"):
        assert tracking.metric_name(name) == name


def test_a_store_that_cannot_be_used_is_refused_before_the_start() -> None:
    for uri in ("file:///nowhere/x", "ftp://host/x", "mlruns"):
        with pytest.raises(BadInput, match=r"use an http\(s\) server or a database"):
            check(uri)
    dead = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(BadInput, match=rf"^tracking\.uri {dead}: nothing answers .*: start it or unset it$"):
        check(dead)
    check("sqlite:////nowhere/x.db")


def test_a_store_that_is_no_database_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.db").write_bytes(b"junk" * 4000)
    with pytest.raises(tracking.TrackingError, match=r"move it away or set MLFLOW_TRACKING_URI$") as caught:
        client(f"sqlite:///{tmp_path / 'm.db'}")
    assert "\n" not in str(caught.value)


def test_the_store_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path / '.piste' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert tracking.tracking_uri() == "http://there"
    assert tracking.tracking_uri("http://here") == "http://here"


@pytest.mark.fault
def test_a_server_that_stalls_and_dies_slows_no_step_and_loses_no_metric(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    port = free_port()
    server = start_server(store, port)
    uri = f"http://127.0.0.1:{port}"
    try:
        record(ledger, tmp_path, "run-1", uri)
        relay = relay_process.RelayProcess(ledger.url, "run-1", uri, tmp_path / "relay.log")
        buffer = MetricBuffer(ledger.apply, "run-1", 1)
        costs, stop = [], threading.Event()

        def write() -> None:
            step = 0
            while not stop.wait(0.002):
                start = time.perf_counter()
                buffer.append({"loss": step / 3}, step)
                costs.append(time.perf_counter() - start)
                step += 1

        writer = threading.Thread(target=write)
        writer.start()

        def arrived(more_than: int) -> Callable[[], bool]:
            return lambda: find_count(store) > more_than

        wait_until(arrived(200), "the relay has begun")
        os.killpg(server.pid, signal.SIGSTOP)
        written = len(costs)
        wait_until(lambda: len(costs) > written + 1000, "writing goes on while the server stalls")
        os.killpg(server.pid, signal.SIGCONT)
        wait_until(arrived(find_count(store)), "the relay goes on")
        end_server(server)
        written = len(costs)
        wait_until(lambda: len(costs) > written + 1000, "writing goes on while the server is gone")
        server = start_server(store, port)
        wait_until(arrived(find_count(store)), "the relay goes on")
        stop.set()
        writer.join()
        buffer.close()
        ledger.set_status("run-1", "finished")
        outcome = relay.finish()
    finally:
        end_server(server)
    assert outcome["pending"] == 0
    rows = ledger.metrics_after("run-1", 0, 10**6)
    assert len(rows) == len(costs) > 2000
    assert shown(store, "run-1") == sorted((m.key, m.step, m.value, m.timestamp) for m in rows)
    assert client(f"sqlite:///{store}").get_run(outcome["mlflow_run_id"]).info.status == "FINISHED"
    assert statistics.median(costs) < 1e-3


def find_count(store: Path) -> int:
    plain = sqlite3.connect(store, timeout=30)
    count = int(plain.execute("select count(*) from metrics").fetchone()[0])
    plain.close()
    return count
