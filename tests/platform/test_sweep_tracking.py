"""The relay of a sweep against real MLflow stores: every trial once, whatever is cut, laid out to compare."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet  # type: ignore[import-untyped]
from tests.platform.shown_sweeps import (
    METRIC,
    add,
    best_series,
    check_best,
    check_view,
    close,
    compute,
    log,
    metrics_of,
    plan,
    relay_whole,
    run_columns,
    runs_of,
)

from piste.config import override
from piste.ledger import Ledger, Message, TrialRecord
from piste.sweep_tracking import BEST, MOST, SweepRelay
from piste.sweep_view import table
from piste.tracking import client, metric_name, sweep_address, sync, view_key

pytest_plugins = ["tests.platform.fixtures"]

REQUESTS = (
    "create_run",
    "delete_run",
    "log_artifact",
    "log_batch",
    "log_text",
    "set_experiment_tag",
    "set_tag",
    "set_terminated",
    "update_run",
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")


@pytest.fixture
def store(shown_home: Path) -> Path:
    return shown_home / "mlflow.db"


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and the list of installed packages take a second a sweep, and are not the subject."""

    def draw(_ledger: Ledger, _trials: Any, _section: Any, folder: Path) -> list[Path]:
        (folder / "best-so-far.png").write_bytes(b"a picture")
        return [folder / "best-so-far.png"]

    monkeypatch.setattr("piste.sweep_reporting.draw_all", draw)
    monkeypatch.setattr("piste.provenance.environment", lambda: "a package")


@pytest.mark.usefixtures("light")
def test_every_kind_of_trial_is_shown(ledger: Ledger, store: Path, tmp_path: Path) -> None:
    other = plan(ledger, tmp_path, "other-sweep-9")
    add(ledger, other, 0)
    compute(ledger, other, 0, 0.7, 0.3)
    name = plan(ledger, tmp_path, repeats=2)
    for number in range(12):
        add(ledger, name, number, 2, reuses=f"{other}-00000" if number == 10 else None)
    compute(ledger, name, 0, *(1.0 / step for step in range(1, 1200)))  # more rows than a batch takes
    compute(ledger, name, 1, 0.5)
    table_file = tmp_path / "sweeps" / name / "trials" / "00001" / "values.json"
    table_file.parent.mkdir(parents=True)
    table_file.write_text('{"columns": [], "data": []}')
    file = {"kind": "table", "name": "deep/values.json", "uri": str(table_file), "sha256": "x", "size": 1}
    ledger.apply(Message(f"{name}-00001", 1, 0, (), ({**file, "step": None},)))
    compute(ledger, name, 2, outcome="failed")  # without a metric
    compute(ledger, name, 3, 0.4, math.nan, outcome="failed")
    compute(ledger, name, 4, math.inf, outcome="failed")
    compute(ledger, name, 5, 0.25)
    compute(ledger, name, 6, 0.9, 0.8, outcome="pruned")
    compute(ledger, name, 7, 0.1)
    compute(ledger, name, 8, *(0.2,) * 499)  # 998 rows: as many as fit into a batch with tags alone
    compute(ledger, name, 9, 0.3)
    ledger.sweeps.settle(name, 10, "finished", 0.3, 2)
    compute(ledger, name, 11, 0.6)
    ledger.sweeps.end(name, "finished", 1.0)
    relay = relay_whole(ledger, name, store)
    check_view(ledger, store, name, 2)
    check_best(ledger, store, relay, 12)
    assert relay.mlflow_run_id is not None
    tags = client(f"sqlite:///{store}").get_run(relay.mlflow_run_id).data.tags
    shown = {t.get("piste.trial"): (run, t) for run, (_, t) in runs_of(store, name).items()}
    files = client(f"sqlite:///{store}").list_artifacts(shown["1"][0], "deep")
    assert [found.path for found in files] == ["deep/values.json"]
    listed = json.loads(shown["1"][1]["mlflow.loggedArtifacts"])
    assert listed == [{"path": "deep/values.json", "type": "table"}]
    assert shown["3"][1]["piste.nonfinite"] == "train/loss = nan at 2"
    counts = {o: tags[f"piste.trials.{o}"] for o in ("finished", "pruned", "failed", "reused")}
    assert counts == {"finished": "8", "pruned": "1", "failed": "3", "reused": "1"}
    best = "Best train/loss: **0.25**, the mean of 2 seeds, at optimizer.lr 0.5."
    assert tags["mlflow.note.content"].startswith(best)


class Stopped(Exception):
    """Stands for the end of the relay's process, or of the server's."""


def stop_at(relay: SweepRelay, nth: int, afterwards: bool) -> Callable[[], bool]:
    """Lets the relay's n-th request raise, before or after it has come to pass; says whether it did."""
    count = 0

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def request(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth and not afterwards:
                raise Stopped
            answer = method(*arguments, **named)
            if count == nth:
                raise Stopped
            return answer

        return request

    for method in REQUESTS:
        setattr(relay._client, method, wrap(getattr(relay._client, method)))
    return lambda: count >= nth


def two_stages(ledger: Ledger, folder: Path, name: str) -> list[Callable[[], None]]:
    """A small sweep with all that matters, as what happens in the ledger one after the other."""

    def begin() -> None:
        plan(ledger, folder, name, repeats=2, trials=4)
        for number in range(4):
            add(ledger, name, number, 2)
        compute(ledger, name, 0, 0.5, 0.4)
        ledger.begin_attempt(f"{name}-00001")
        log(ledger, f"{name}-00001", 0.7)

    def end() -> None:
        log(ledger, f"{name}-00001", 0.3, start=2)
        close(ledger, name, 1, f"{name}-00001", "finished")
        compute(ledger, name, 2, outcome="failed")
        compute(ledger, name, 3, math.nan, outcome="failed")
        ledger.sweeps.end(name, "finished", 1.0)

    return [begin, end]


@pytest.mark.slow
@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("how", ["before a request", "after a request", "and the same relay goes on"])
def test_a_relay_may_be_stopped_at_any_request(ledger: Ledger, store: Path, tmp_path: Path, how: str) -> None:
    uri = f"sqlite:///{store}"
    for nth in range(1, 200):
        name = f"bowl-sweep-{nth}"
        relay = SweepRelay(ledger, name, uri)
        has_stopped = stop_at(relay, nth, afterwards=how != "before a request")
        for happen in two_stages(ledger, tmp_path, name):
            happen()
            try:
                relay.step()
            except Stopped:
                if how != "and the same relay goes on":
                    relay = SweepRelay(ledger, name, uri)
                relay.step()
        assert relay.step() is True
        check_view(ledger, store, name, 2)
        check_best(ledger, store, relay, 4)
        if not has_stopped():
            assert nth > 25, "there were requests to stop at"
            return
    raise AssertionError("it never ran through")


@pytest.mark.usefixtures("light")
def test_interrupted_resumed_extended_and_trained_longer(ledger: Ledger, store: Path, tmp_path: Path) -> None:
    name = plan(ledger, tmp_path, repeats=2, trials=6)
    for number in range(6):
        add(ledger, name, number, 2)
    compute(ledger, name, 0, 0.5)
    ledger.begin_attempt(f"{name}-00001")
    log(ledger, f"{name}-00001", 0.8, 0.7)
    uri = f"sqlite:///{store}"
    assert SweepRelay(ledger, name, uri).step() is False
    check_view(ledger, store, name, 2, lacking=(2, 3, 4, 5))
    ledger.sweeps.end(name, "interrupted", 1.0, "interrupted by the user")
    relay_whole(ledger, name, store)
    check_view(ledger, store, name, 2, lacking=(2, 3, 4, 5))  # what has not begun is nothing to look at

    ledger.sweeps.claim(name, "nowhere:2")
    relay = SweepRelay(ledger, name, uri)
    assert relay.step() is False
    ledger.begin_attempt(f"{name}-00001")
    assert relay.step() is False
    check_view(ledger, store, name, 2, lacking=(2, 3, 4, 5))
    log(ledger, f"{name}-00001", 0.6, 0.45, start=3)
    close(ledger, name, 1, f"{name}-00001", "finished")
    for number in range(2, 6):
        compute(ledger, name, number, 0.9, 1.0 / number)
    ledger.sweeps.end(name, "finished", 1.0)
    assert relay.step() is True
    check_view(ledger, store, name, 2)
    check_best(ledger, store, relay, 6)

    config = override(ledger.sweeps.get(name).config, {"sweep.trials": 8})
    ledger.sweeps.extend(name, 8, config)
    ledger.sweeps.claim(name, "nowhere:3")
    for number in (6, 7):
        add(ledger, name, number, 2)
        compute(ledger, name, number, 0.1 / number)
    ledger.sweeps.end(name, "finished", 1.0)
    relay = relay_whole(ledger, name, store)
    check_view(ledger, store, name, 2)
    check_best(ledger, store, relay, 8)

    config = override(config, {"problem.steps": 200})
    trials = ledger.sweeps.trials(name)
    ledger.sweeps.lengthen(name, config, [{"id": t.run_id} for t in trials])
    ledger.sweeps.claim(name, "nowhere:4")
    for trial in trials:
        ledger.begin_attempt(trial.run_id)
        log(ledger, trial.run_id, 0.01 * (trial.number + 1), start=150)
        close(ledger, name, trial.number, trial.run_id, "finished")
    ledger.sweeps.end(name, "finished", 1.0)
    relay = relay_whole(ledger, name, store)
    assert relay.mlflow_run_id is not None
    longer = best_series(store, relay.mlflow_run_id, f"best/{METRIC}/problem.steps 200")
    assert longer == [(1, 0.01), (8, 0.01)]
    run = client(uri).get_run(relay.mlflow_run_id)
    assert (run.data.params["problem.steps"], run.data.tags["piste.now.problem.steps"]) == ("100", "200")
    assert run.data.tags["piste.now.sweep.trials"] == "8"
    runs = runs_of(store, name)
    for trial in ledger.sweeps.trials(name):
        ((found, (status, _)),) = [i for i in runs.items() if i[1][1].get("piste.trial") == str(trial.number)]
        assert status == "FINISHED"
        rows = ledger.metrics_after(trial.run_id, 0, 10**6)
        assert metrics_of(store, found) == sorted((r.key, r.step, r.value, r.timestamp) for r in rows)
    for run_id, (status, tags) in runs.items():
        if tags["piste.kind"] == "cell":
            mean = {m[1]: m[2] for m in metrics_of(store, run_id) if m[0] == METRIC}[150]
            number = int(tags["piste.sweep_cell"])
            assert (status, mean) == ("FINISHED", pytest.approx(0.01 * (2 * number + 1.5)))


@pytest.mark.usefixtures("light")
def test_a_trial_that_is_tried_again_leaves_nothing_stale(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    name = plan(ledger, tmp_path)
    relay = SweepRelay(ledger, name, f"sqlite:///{store}")
    first = add(ledger, name, 0)
    ledger.begin_attempt(first)
    log(ledger, first, 0.5, math.nan)
    relay.step()
    check_view(ledger, store, name)
    ledger.set_status(first, "finished", "train/loss ended at nan")
    again = f"{name}-00000-1"
    ledger.sweeps.replace_run(name, 0, run_columns(name, 0, again))
    relay.step()
    ledger.begin_attempt(again)
    log(ledger, again, 0.4, 0.2)
    relay.step()
    check_view(ledger, store, name)
    close(ledger, name, 0, again, "finished")
    ledger.sweeps.end(name, "finished", 1.0)
    assert relay.step() is True
    check_view(ledger, store, name)


@pytest.mark.usefixtures("light")
def test_the_best_so_far_is_exact_in_whatever_order_trials_end(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    name = plan(ledger, tmp_path, trials=8)
    for number in range(8):
        add(ledger, name, number)
    values = dict(zip((2, 0, 1, 5, 4, 7, 3, 6), (0.3, 0.9, 0.4, 0.2, 0.25, 0.1, 0.6, 0.15), strict=True))
    closed: set[int] = set()
    for number, value in values.items():
        failed = value == 0.25
        compute(
            ledger, name, number, math.nan if failed else value, outcome="failed" if failed else "finished"
        )
        closed.add(number)
        relay = SweepRelay(ledger, name, f"sqlite:///{store}")  # each time a new one, which knows nothing
        relay.step()
        prefix = next(n for n in range(9) if n not in closed)
        check_best(ledger, store, relay, prefix)
    ledger.sweeps.end(name, "finished", 1.0)
    check_best(ledger, store, relay_whole(ledger, name, store), 8)


@pytest.mark.usefixtures("light")
def test_two_relays_at_once_show_nothing_twice(ledger: Ledger, store: Path, tmp_path: Path) -> None:
    name = plan(ledger, tmp_path, repeats=2, trials=8)
    relays = [SweepRelay(ledger, name, f"sqlite:///{store}") for _ in range(2)]
    for number in range(8):
        add(ledger, name, number, 2)
        compute(ledger, name, number, 1.0 / (number + 1))
        relays[number % 3 % 2].step()
    ledger.sweeps.end(name, "finished", 1.0)
    assert [relay.step() for relay in relays] == [True, True]
    check_view(ledger, store, name, 2)
    check_best(ledger, store, relays[1], 8)


@pytest.mark.usefixtures("light")
def test_what_is_shown_whole_is_not_shown_again(
    ledger: Ledger, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    name = plan(ledger, tmp_path)
    add(ledger, name, 0)
    compute(ledger, name, 0, 0.5)
    ledger.sweeps.end(name, "finished", 1.0)
    assert sync(ledger, [("sweep", name)]) == {name: 0}
    check_view(ledger, store, name)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it is shown already")

    for method in REQUESTS:
        monkeypatch.setattr(MlflowClient, method, refuse)
    assert sync(ledger, [("sweep", name)]) == {name: 0}


@pytest.mark.usefixtures("light")
def test_a_poll_without_news_reads_no_trial(
    ledger: Ledger, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = plan(ledger, tmp_path)
    for number in range(3):
        add(ledger, name, number)
    compute(ledger, name, 0, 0.5)
    ledger.begin_attempt(f"{name}-00001")
    relay = SweepRelay(ledger, name, f"sqlite:///{store}")
    relay.step()
    reads = []
    read = ledger.sweeps.trials

    def counted(sweep_id: str) -> list[TrialRecord]:
        reads.append(sweep_id)
        return read(sweep_id)

    monkeypatch.setattr(ledger.sweeps, "trials", counted)
    log(ledger, f"{name}-00001", 0.4)  # rows of a trial that runs are news, but not of the trials
    relay.step()
    assert reads == []
    check_view(ledger, store, name, lacking=(2,))
    reads.clear()
    close(ledger, name, 1, f"{name}-00001", "finished")
    relay.step()
    assert reads == [name]
    check_view(ledger, store, name, lacking=(2,))
    reads.clear()
    relay.step()
    assert reads == []


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("repeats", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_of_a_large_packed_sweep_the_best_are_runs_and_all_are_in_a_table(
    ledger: Ledger, store: Path, tmp_path: Path, repeats: int
) -> None:
    total = MOST + 8
    name = plan(ledger, tmp_path, repeats=repeats, trials=total)
    runs, trials, metrics = [], list[dict[str, Any]](), []
    for number in range(total):
        value = math.nan if number % 50 == 7 else float((number * 7919) % 1009)
        outcome = "finished" if math.isfinite(value) else "failed"
        run_id = f"{name}-{number:05d}"
        ended = {"status": outcome, "attempt": 1, "finished": 3000.0 + number}
        runs.append(run_columns(name, number, run_id, seed=number % repeats, **ended))
        trial = {"sweep_id": name, "number": number, "cell": number // repeats, "memory": None, "step": 1}
        trial |= {"values": {"optimizer.lr": number / 7}, "run_id": run_id, "reused": False}
        finite = math.isfinite(value)
        trial |= {
            "outcome": outcome,
            "value": value if finite else None,
            "special": None if finite else "nan",
        }
        trials.append(trial)
        metric = {"run_id": run_id, "key": METRIC, "step": 1, "timestamp": 5}
        metrics.append(metric | {"value": trial["value"], "special": trial["special"]})
    half = total // 2
    ledger.sweeps.record(runs[:half], trials[:half], metrics[:half])
    relay = SweepRelay(ledger, name, f"sqlite:///{store}")
    assert relay.step() is False
    assert len(runs_of(store, name)) == 1  # which are the best is not known yet
    ledger.sweeps.record(runs[half:], trials[half:], metrics[half:])
    ledger.sweeps.end(name, "finished", 1.0)
    assert relay.step() is True
    assert relay.pending() == 0

    records = ledger.sweeps.trials(name)
    shown = {int(t["piste.trial"]) for _, t in runs_of(store, name).values() if "piste.trial" in t}
    assert len(shown) == BEST
    if repeats == 1:
        finished = sorted(
            (t.value, t.number) for t in records if t.outcome == "finished" and t.value is not None
        )
        assert shown == {number for _, number in finished[:BEST]}
    check_view(ledger, store, name, repeats, lacking=[t.number for t in records if t.number not in shown])
    check_best(ledger, store, relay, total)

    assert relay.mlflow_run_id is not None
    path = client(f"sqlite:///{store}").download_artifacts(
        relay.mlflow_run_id, "trials.parquet", str(tmp_path)
    )
    rows = parquet.read_table(path).to_pylist()
    for row, t in zip(rows, records, strict=True):
        expected = {"trial": t.number, "cell": t.cell, **t.values, "seed": t.seed, "outcome": t.outcome}
        expected |= {"step": t.step, "seconds": t.seconds, "reused": t.reused, "run": t.run_id}
        objective = row.pop("objective")
        assert row == expected
        assert objective == t.value or (math.isnan(objective) and math.isnan(t.value or 0.0))


def test_the_table_takes_any_values(ledger: Ledger, tmp_path: Path) -> None:
    name = plan(ledger, tmp_path)
    kinds: list[dict[str, Any]] = [{"a": 1, "b": 0.5, "c": [1, 2]}, {"a": "one"}, {"b": 3, "d": True}]
    for number, values in enumerate(kinds):
        add(ledger, name, number, **values)
    made = table(ledger.sweeps.trials(name)).to_pylist()
    assert [row["a"] for row in made] == ["1", "one", None]
    assert [row["b"] for row in made] == [0.5, None, 3.0]
    assert [row["c"] for row in made] == [[1, 2], None, None]
    assert [row["d"] for row in made] == [None, None, True]


def test_a_small_sweep_shows_pictures_a_table_and_where_to_compare(
    ledger: Ledger, store: Path, tmp_path: Path
) -> None:
    name = plan(ledger, tmp_path, repeats=2, trials=12)
    for number in range(12):
        add(ledger, name, number, 2)
        compute(ledger, name, number, 0.9, 1.0 / (number + 1))
    ledger.sweeps.end(name, "interrupted", 1.0)
    uri = f"sqlite:///{store}"
    relay_whole(ledger, name, store)
    ledger.sweeps.claim(name, "nowhere:2")
    ledger.sweeps.end(name, "finished", 1.0)
    relay = relay_whole(ledger, name, store)  # shown a second time, the table has no row twice
    assert relay.mlflow_run_id is not None
    view = client(uri)
    run = view.get_run(relay.mlflow_run_id)
    pictures = {file.path for file in view.list_artifacts(relay.mlflow_run_id, "pictures")}
    assert {"pictures/parallel-coordinates.png", "pictures/best-so-far.png"} <= pictures
    path = view.download_artifacts(relay.mlflow_run_id, "trials.json", str(tmp_path))
    listed = json.loads(Path(path).read_text())
    assert [row[listed["columns"].index("objective")] for row in listed["data"]] == [
        t.value for t in ledger.sweeps.trials(name)
    ]
    experiment = view.get_experiment(run.info.experiment_id)
    layout = json.loads(experiment.tags[view_key(name)])
    found = view.search_runs(
        [experiment.experiment_id],
        layout["searchFilter"],
        order_by=[f"{layout['orderByKey']} {'ASC' if layout['orderByAsc'] else 'DESC'}"],
    )
    assert [int(r.data.tags["piste.trial"]) for r in found] == list(range(11, -1, -1))
    assert found[0].info.run_name == "lr 0.6 seed 1 (trial 11)"
    assert next(iter(found[0].data.metrics)) == METRIC  # MLflow's comparison page opens on the first
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    page = f"/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={metric_name(name)}"
    assert page in sweep_address(uri, name)
    assert sweep_address(uri, "another") == "http://127.0.0.1:5000"
    note = run.data.tags["mlflow.note.content"]
    assert "Best train/loss: **0.08712**, the mean of 2 seeds, at optimizer.lr 0.6." in note
    assert all(r.info.run_id in note for r in found), "they are compared side by side"
