"""The ledger in PostgreSQL: it outlives a restart, counts a lost answer once, and keeps its order."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from tests.platform.driving import free_port, wait_until, write
from tests.platform.ledgers import COLUMNS, recorded, refused
from tests.platform.postgres_server import Postgres, Wire

from piste.ledger import Ledger, LedgerError, Message, Row
from piste.ledger.tables import Base
from piste.sweeping import sweep

pytest_plugins = ["tests.platform.fixtures", "tests.platform.postgres"]

SWEEP = {"recipe": "r", "workload": "w", "config": {}, "provenance": {}, "directory": "d", "trials": 2}
RUN = {
    **COLUMNS,
    "status": "planned",
    "attempt": 0,
    "created": 1.0,
    "recomputed_different": 0,
    "seconds": 0.0,
}
TRIAL = {"cell": 0, "values": {"lr": 0.5}, "run_id": "s-0", "reused": False}
FIGURE = {"kind": "figure", "name": "a.png", "uri": "/a", "sha256": "1", "size": 1, "step": None}
JOB = {"request": {}, "content": "c", "address": "http://head:8265"}
METRIC = {"run_id": "s-0", "key": "loss", "step": 1, "value": 0.5, "special": None, "timestamp": 7}


@pytest.fixture
def ledger(postgres_url: str) -> Ledger:
    made = Ledger(postgres_url)
    made.create(id="run", **COLUMNS)
    made.begin_attempt("run")
    return made


def rows(*steps: int) -> tuple[Row, ...]:
    return tuple(Row("loss", step, step / 3, 7) for step in steps)


# -- opening ----------------------------------------------------------------------------------------------


def test_what_cannot_be_opened_is_refused_at_once(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quick(url: str, *words: str) -> None:
        begun = time.monotonic()
        refused(lambda: Ledger(url), *words)
        assert time.monotonic() - begun < 10

    url = postgres.url("postgres")
    quick(postgres.url("x", free_port()), "Connection refused", "start PostgreSQL there")
    quick(postgres.url("absent"), 'database "absent" does not exist', "create it with `createdb`")
    quick(url.replace("127.0.0.1", "nowhere.invalid"), "failed to resolve", "correct the host")
    wrong = url.replace("piste@", "piste:not-the-password@")
    quick(wrong, "password authentication failed", "piste:***@", "the file that PGPASSFILE names")
    with pytest.raises(LedgerError) as caught:
        Ledger(wrong)
    assert "not-the-password" not in str(caught.value)
    monkeypatch.delenv("PGPASSFILE")
    quick(url, "no password supplied", "write its password into the file that PGPASSFILE names")


def test_a_role_that_may_not_create_tables_is_refused(postgres: Postgres, postgres_url: str) -> None:
    postgres.sql("CREATE ROLE guest LOGIN PASSWORD 'welcome'")
    url = postgres_url.replace("piste@", "guest:welcome@")
    try:
        refused(lambda: Ledger(url), "permission denied for schema public", "let the role own the database")
    finally:
        postgres.sql("DROP ROLE guest")


def test_a_missing_driver_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    refused(
        lambda: Ledger("postgresql://me:secret@h/x"), "psycopg is missing", "'piste[postgres]'", "me:***@"
    )


def test_a_recipe_with_a_number_that_is_not_finite_is_refused(ledger: Ledger) -> None:
    columns = COLUMNS | {"config": {"clip": math.inf}}
    refused(lambda: ledger.create(id="clipped", **columns), "json", "write a finite number")


# -- patience ---------------------------------------------------------------------------------------------


def test_a_call_waits_while_the_database_is_restarted(ledger: Ledger, postgres: Postgres) -> None:
    ledger.apply(Message("run", 1, 1, rows(1)))
    for mode in ("immediate", "fast"):
        postgres.stop(mode)
        back = threading.Timer(0.5, postgres.start)
        back.start()
        assert ledger.run("run").status == "running"
        back.join()
    postgres.stop()
    back = threading.Timer(0.5, postgres.start)
    back.start()
    assert ledger.apply(Message("run", 1, 2, rows(1, 2))) == 2
    back.join()
    assert recorded(ledger) == [("loss", 1, 1 / 3, 7), ("loss", 2, 2 / 3, 7)]


def test_a_known_ledger_is_opened_patiently(ledger: Ledger, postgres: Postgres) -> None:
    postgres.stop()
    refused(lambda: Ledger(ledger.url), "Connection refused")
    back = threading.Timer(0.5, postgres.start)
    back.start()
    assert Ledger(ledger.url, patient=True).run("run").id == "run"
    back.join()


def test_patience_has_an_end(ledger: Ledger, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piste.ledger.faults.PATIENCE_SECONDS", 0.5)
    postgres.stop()
    begun = time.monotonic()
    refused(lambda: ledger.sweeps.reusable(["i"], "loss"), "Connection refused", "start PostgreSQL there")
    assert time.monotonic() - begun < 5
    postgres.start()
    assert ledger.sweeps.reusable(["i"], "loss") == {}


def test_a_transaction_under_way_is_made_again(ledger: Ledger, postgres: Postgres) -> None:
    """The server dies just before a COMMIT, and another's transaction is the first after it."""
    other = Ledger(ledger.url)
    crashes = 0

    def crash(_connection: Any) -> None:
        nonlocal crashes
        if crashes == 0:
            crashes += 1
            postgres.restart()
            other.create(id="another", **COLUMNS)

    with listening(ledger, "commit", crash):
        assert ledger.begin_attempt("run") == 2
    assert crashes == 1
    assert ledger.run("run").attempt == 2


@contextmanager
def listening(ledger: Ledger, name: str, listener: Callable[..., None]) -> Iterator[None]:
    event.listen(ledger.engine, name, listener)
    try:
        yield
    finally:
        event.remove(ledger.engine, name, listener)


# -- a lost acknowledgement -------------------------------------------------------------------------------


def all_calls(ledger: Ledger) -> list[Callable[[], object]]:
    """Every writing call, in an order in which each changes something."""
    sweeps, jobs = ledger.sweeps, ledger.jobs
    return [
        lambda: ledger.create(id="run", **COLUMNS),
        lambda: ledger.begin_attempt("run"),
        lambda: ledger.claim("run", "elsewhere:1"),
        lambda: ledger.begin_attempt("run"),
        lambda: ledger.apply(Message("run", 2, 1, rows(1, 2, 3), (FIGURE,))),
        lambda: ledger.apply(Message("run", 2, 2, (Row("loss", 3, 0.0, 8), Row("loss", 4, 0.0, 8)))),
        lambda: ledger.set_status("run", "finished"),
        lambda: sweeps.create(id="s", **SWEEP),
        lambda: sweeps.claim("s", "elsewhere:1"),
        lambda: sweeps.record([{**RUN, "id": "s-0"}], [{**TRIAL, "sweep_id": "s", "number": 0}], [METRIC]),
        lambda: sweeps.settle("s", 0, "finished", 0.5, 1),
        lambda: sweeps.replace_run("s", 0, {**RUN, "id": "s-0-1"}),
        lambda: sweeps.extend("s", 3, {"more": True}),
        lambda: sweeps.lengthen("s", {"longer": True}, [{"id": "s-0-1", "config": {"longer": True}}]),
        lambda: sweeps.end("s", "interrupted", 2.5),
        lambda: sweeps.end("s", "finished", 1.25),
        lambda: jobs.create(id="job", **JOB),
        lambda: jobs.set_subject("job", "run"),
        lambda: jobs.set_status("job", "succeeded"),
    ]


def content(ledger: Ledger) -> dict[str, list[dict[str, Any]]]:
    """All tables, without the times of their rows and the numbers that they were given."""
    left_out = {"runs": {"created", "started", "finished", "seconds"}, "sweeps": {"created", "finished"}}
    left_out |= {"jobs": {"created", "finished"}, "metrics": {"id"}, "artifacts": {"id"}}
    found = {}
    with ledger.reading() as connection:
        for table in Base.metadata.sorted_tables:
            rows = connection.execute(table.select().order_by(*table.primary_key)).mappings()
            without = left_out.get(table.name, set())
            found[table.name] = [{k: v for k, v in row.items() if k not in without} for row in rows]
    return found


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_cut_at_commit_is_counted_once(postgres: Postgres, moment: str) -> None:
    plain = Ledger(postgres.create())
    for call in all_calls(plain):
        call()
    url = postgres.create()
    with Wire(postgres.port) as wire:
        cut = Ledger(url.replace(f":{postgres.port}/", f":{wire.port}/"))
        for number, call in enumerate(all_calls(cut), 1):
            wire.cut(moment)
            call()
            assert wire.cuts == number
        assert content(cut) == content(plain)


def test_a_cut_among_many_rows_is_counted_once(postgres: Postgres, postgres_url: str) -> None:
    with Wire(postgres.port) as wire:
        cut = Ledger(postgres_url.replace(f":{postgres.port}/", f":{wire.port}/"))
        cut.sweeps.create(id="s", **SWEEP)
        runs = [{**RUN, "id": f"s-{n}"} for n in range(1000)]
        trials = [{**TRIAL, "run_id": f"s-{n}", "sweep_id": "s", "number": n} for n in range(1000)]
        metrics = [{**METRIC, "run_id": f"s-{n}"} for n in range(1000)]
        wire.cut("before", b"COPY trials")
        cut.sweeps.record(runs, trials, metrics)
        wire.cut("after", b"s-999")
        cut.sweeps.record([], [], [{**METRIC, "run_id": f"s-{n}", "key": "other"} for n in range(1000)])
        assert wire.cuts == 2
        assert cut.sweeps.count("s") == 1000
        assert cut.sweeps.trials("s")[999].values == {"lr": 0.5}
        assert [cut.count_after(f"s-{n}") for n in (0, 999)] == [2, 2]
        refused(lambda: cut.sweeps.record(runs[:1], []), "duplicate key value")


# -- several writers --------------------------------------------------------------------------------------


@contextmanager
def held(ledger: Ledger, call: Callable[[], object]) -> Iterator[None]:
    """While a call, in a thread of its own, has done its work and stands before its COMMIT."""
    there, go = threading.Event(), threading.Event()

    def wait(_connection: Any) -> None:
        there.set()
        assert go.wait(60)

    thread = threading.Thread(target=call)
    with listening(ledger, "commit", wait):
        thread.start()
        try:
            assert there.wait(30)
            yield
        finally:
            go.set()
            thread.join()


def is_waiting(ledger: Ledger) -> bool:
    """Whether a session of this database waits for another's lock."""
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    with ledger.engine.connect() as connection:
        return bool(connection.exec_driver_sql(f"{sessions} AND wait_event_type = 'Lock'").scalar_one())


def test_a_relay_skips_no_row_of_two_writers(ledger: Ledger) -> None:
    other, relay = Ledger(ledger.url), Ledger(ledger.url)
    second = threading.Thread(target=other.apply, args=(Message("run", 1, 1, rows(3, 4)),))
    with held(ledger, lambda: ledger.apply(Message("run", 1, 1, rows(1, 2)))):
        second.start()
        wait_until(lambda: is_waiting(relay) or not second.is_alive(), "the second writer is done or waits")
        early = relay.metrics_after("run", 0, 100)
    second.join()
    late = relay.metrics_after("run", early[-1].id if early else 0, 100)
    assert [row.step for row in (*early, *late)] == [1, 2, 3, 4]


def test_an_attempt_that_is_given_up_cannot_write_after_the_next_has_begun(ledger: Ledger) -> None:
    other = Ledger(ledger.url)
    late = threading.Thread(target=ledger.apply, args=(Message("run", 1, 1, rows(1)),))
    with held(other, lambda: other.begin_attempt("run")):
        late.start()
        wait_until(lambda: is_waiting(ledger) or not late.is_alive(), "the late writer is done or waits")
    late.join()
    assert recorded(ledger) == []


def test_a_run_that_another_session_holds_is_one_line(ledger: Ledger) -> None:
    hasty = Ledger(f"{ledger.url}?options=-c%20lock_timeout=100")
    with held(ledger, lambda: ledger.apply(Message("run", 1, 1, rows(1)))):
        refused(
            lambda: hasty.apply(Message("run", 1, 2, rows(2))), "lock timeout", "another session holds it"
        )
    assert hasty.apply(Message("run", 1, 2, rows(2))) == 2
    assert [row.step for row in hasty.metrics_after("run", 0, 100)] == [1, 2]


def test_of_two_drivers_that_claim_at_once_one_is_refused(ledger: Ledger) -> None:
    first, second = f"here:{os.getpid()}", f"here:{os.getppid()}"
    other = Ledger(ledger.url)
    errors: list[str] = []

    def claim() -> None:
        try:
            other.claim("run", second)
        except LedgerError as error:
            errors.append(str(error))

    thread = threading.Thread(target=claim)
    with held(ledger, lambda: ledger.claim("run", first)):
        thread.start()
        wait_until(lambda: is_waiting(other) or not thread.is_alive(), "the second driver is done or waits")
    thread.join()
    assert errors == [f"run is running in process {os.getpid()}: end that first"]
    assert ledger.run("run").driver == first


# -- a sweep ----------------------------------------------------------------------------------------------

RECIPE = """
workload = "quadratic"
[problem]
steps = 6
[sweep]
metric = "train/loss"
trials = 12
batch = 2
[sweep.space]
"optimizer.name" = { choice = ["sgd", "adamw"] }
"optimizer.lr" = { log_uniform = [1e-2, 10.0] }
seed = { repeats = 2 }
"""


@pytest.mark.usefixtures("no_view")
def test_a_sweep_has_the_same_trials_in_both_databases(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trials() -> list[dict[str, Any]]:
        done = sweep(write(tmp_path / "recipe.toml", RECIPE), local=True)
        assert done.status == "finished"
        other = {"run_id", "created", "finished", "seconds"}
        return [{k: v for k, v in trial._asdict().items() if k not in other} for trial in done.trials]

    in_sqlite = trials()
    monkeypatch.setenv("PISTE_LEDGER", postgres_url)
    assert trials() == in_sqlite
    assert len(in_sqlite) == 12
    again = sweep(tmp_path / "recipe.toml", local=True)
    assert [trial.reused for trial in again.trials] == [True] * 12
