"""The ledger: what is sent is recorded once, and what goes wrong is one line."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import piste.ledger.database
from piste.errors import BadInput
from piste.ledger import Ledger, LedgerError, Message, Row, default_url, number

COLUMNS: dict[str, Any] = {
    "recipe": "r",
    "workload": "w",
    "seed": 0,
    "config": {},
    "provenance": {},
    "identity": "i",
    "cell": "c",
    "directory": "d",
}


def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(url(tmp_path / "ledger.db"))
    made.create(id="run", **COLUMNS)
    made.begin_attempt("run")
    return made


def recorded(ledger: Ledger, run_id: str = "run") -> list[tuple[str, int, float, int]]:
    return [(m.key, m.step, number(m), m.timestamp) for m in ledger.metrics_after(run_id, 0, 10**6)]


# -- idempotence ----------------------------------------------------------------------------------------

_rows = st.builds(
    Row,
    st.sampled_from(["loss", "norm", "time/step", "system/cpu"]),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.1, 1.5, math.nan, math.inf, -math.inf]),
    st.integers(0, 10**13),
)


@st.composite
def _deliveries(draw: st.DrawFn) -> list[tuple[Row, ...]]:
    """Messages as they come in: doubled, late, and sent again until each has arrived."""
    messages = draw(st.lists(st.lists(_rows, min_size=1, max_size=5).map(tuple), min_size=1, max_size=5))
    early = draw(st.lists(st.integers(0, len(messages) - 1), max_size=6))
    late = draw(st.permutations([n for n in range(len(messages)) if n not in early]))
    return [messages[n] for n in [*early, *late]]


@settings(max_examples=60)
@given(arriving=_deliveries())
def test_the_first_of_each_key_and_step_stays(arriving: list[tuple[Row, ...]]) -> None:
    ledger = Ledger("sqlite://")
    ledger.create(id="run", **COLUMNS)
    attempt = ledger.begin_attempt("run")
    kept: dict[tuple[str, int], tuple[float, int]] = {}
    different = 0
    for sequence, rows in enumerate(arriving, start=1):
        assert ledger.apply(Message("run", attempt, sequence, rows)) == sequence
        before = dict(kept)
        offered: dict[tuple[str, int], float] = {}
        for row in rows:
            kept.setdefault((row.key, row.step), (row.value, row.timestamp))
            offered.setdefault((row.key, row.step), row.value)
        for place, value in offered.items():
            if place in before and not place[0].startswith(("time/", "system/")):
                was = before[place][0]
                different += not (was == value or (math.isnan(was) and math.isnan(value)))
    expected = [(key, step, repr(value), stamp) for (key, step), (value, stamp) in kept.items()]
    assert [(k, s, repr(v), t) for k, s, v, t in recorded(ledger)] == expected
    assert ledger.run("run").recomputed_different == different
    ledger.engine.dispose()


def test_values_that_are_not_finite_come_back(ledger: Ledger) -> None:
    values = [math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, 0.1, -1e300]
    ledger.apply(Message("run", 1, 1, tuple(Row("x", n, v, 0) for n, v in enumerate(values))))
    assert [repr(v) for _, v in ledger.history("run", "x")] == [repr(v) for v in values]
    assert ledger.last_values("run") == {"x": -1e300}


def test_reading_back_agrees_with_plain_sql(ledger: Ledger, tmp_path: Path) -> None:
    rows = tuple(Row(key, step, step / 3, 7) for step in (2, 0, 1) for key in ("b", "a"))
    ledger.apply(Message("run", 1, 1, rows))
    assert ledger.keys("run") == ["a", "b"]
    assert ledger.history("run", "a") == [(0, 0.0), (1, 1 / 3), (2, 2 / 3)]
    assert ledger.last_values("run") == {"a": 2 / 3, "b": 2 / 3}
    first = ledger.metrics_after("run", 0, 4)
    assert [(m.key, m.step) for m in first] == [("b", 2), ("a", 2), ("b", 0), ("a", 0)]
    assert ledger.count_after("run", first[-1].id) == 2
    plain = sqlite3.connect(tmp_path / "ledger.db")
    assert plain.execute("select key, step, value, timestamp from metrics order by id").fetchall() == list(
        rows
    )
    assert plain.execute("pragma journal_mode").fetchone() == ("wal",)
    plain.close()


# -- attempts -------------------------------------------------------------------------------------------


def test_an_earlier_attempt_is_fenced_off(ledger: Ledger) -> None:
    ledger.set_status("run", "failed", "it fell")
    assert ledger.begin_attempt("run") == 2
    run = ledger.run("run")
    assert (run.status, run.error, run.finished) == ("running", None, None)
    late = Message("run", 1, 9, (Row("loss", 1, 1.0, 0),), ({"kind": "f"},))
    assert ledger.apply(late) == 9
    assert recorded(ledger) == []
    assert ledger.artifacts("run") == []
    assert ledger.run("run").status == "running"
    ledger.apply(Message("run", 2, 1, (Row("loss", 1, 2.0, 0),)))
    assert recorded(ledger) == [("loss", 1, 2.0, 0)]
    assert ledger.apply(Message("unknown", 1, 3, (Row("loss", 1, 2.0, 0),))) == 3
    assert recorded(ledger, "unknown") == []


def test_a_file_recorded_again_replaces_its_record(ledger: Ledger) -> None:
    record = {"kind": "figure", "name": "a.png", "uri": "/a", "sha256": "1", "size": 1, "step": None}
    ledger.apply(Message("run", 1, 1, (), (record,)))
    ledger.apply(Message("run", 1, 2, (), ({**record, "sha256": "2"}, {**record, "name": "b.png"})))
    assert [(a.name, a.sha256) for a in ledger.artifacts("run")] == [("a.png", "2"), ("b.png", "1")]


def test_a_live_drivers_run_cannot_be_claimed(ledger: Ledger) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    alive, dead, me = f"here:{os.getppid()}", f"here:{done.pid}", f"here:{os.getpid()}"
    ledger.claim("run", alive)
    with pytest.raises(LedgerError, match=rf"^run is running in process {os.getppid()}: end that first$"):
        ledger.claim("run", me)
    claimed = ledger.run("run")
    assert (claimed.driver, claimed.status, claimed.finished) == (alive, "planned", None)
    ledger.claim("run", alive)
    ledger.set_status("run", "interrupted")
    ledger.claim("run", dead)
    ledger.begin_attempt("run")
    ledger.claim("run", me)
    assert ledger.run("run").driver == me


def test_a_pruned_run_stays_so_until_it_begins_again(ledger: Ledger) -> None:
    ledger.begin_attempt("run")
    ledger.set_status("run", "pruned")
    ledger.set_status("run", "failed", "its worker was ended")
    assert (ledger.run("run").status, ledger.run("run").error) == ("pruned", None)
    ledger.begin_attempt("run")
    ledger.set_status("run", "failed", "why")
    assert (ledger.run("run").status, ledger.run("run").error) == ("failed", "why")


def test_runs_are_found_by_the_beginning_of_their_id(ledger: Ledger) -> None:
    for name in ("run-2", "other", "per%cent"):
        ledger.create(id=name, **COLUMNS)
    assert ledger.run("run").id == "run"
    assert ledger.run("oth").id == "other"
    with pytest.raises(BadInput, match="several runs begin with id 'ru'"):
        ledger.run("ru")
    with pytest.raises(BadInput, match="no run has id '%'"):
        ledger.run("%")
    assert ledger.runs(limit=1)[0].id == "per%cent"
    assert len(ledger.runs()) == 4


# -- what goes wrong ------------------------------------------------------------------------------------


def refused(act: Callable[[], object], *words: str) -> None:
    with pytest.raises(LedgerError) as caught:
        act()
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_newer_schema_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.db") as plain:
        plain.execute("update meta set value = '99' where key = 'schema_version'")
    plain.close()
    refused(lambda: Ledger(ledger.url), "has schema version 99, newer than", "upgrade piste")


VERSION_1 = """
CREATE TABLE meta ("key" VARCHAR NOT NULL, value VARCHAR NOT NULL, PRIMARY KEY ("key"));
CREATE TABLE runs (
    id VARCHAR NOT NULL, recipe VARCHAR NOT NULL, workload VARCHAR NOT NULL, seed INTEGER NOT NULL,
    config JSON NOT NULL, provenance JSON NOT NULL, identity VARCHAR NOT NULL, cell VARCHAR NOT NULL,
    directory VARCHAR NOT NULL, status VARCHAR NOT NULL, attempt INTEGER NOT NULL, driver VARCHAR,
    created DOUBLE NOT NULL, finished DOUBLE, error VARCHAR, recomputed_different INTEGER NOT NULL,
    PRIMARY KEY (id)
);
CREATE TABLE metrics (
    id INTEGER NOT NULL, run_id VARCHAR NOT NULL, "key" VARCHAR NOT NULL, step BIGINT NOT NULL, value DOUBLE,
    special VARCHAR, timestamp BIGINT NOT NULL, PRIMARY KEY (id), UNIQUE (run_id, "key", step),
    FOREIGN KEY(run_id) REFERENCES runs (id)
);
INSERT INTO meta VALUES ('schema_version', '1');
INSERT INTO runs VALUES (
    'old', 'r', 'quadratic', 0, '{}', '{"code_version": "c"}', 'i', 'c', '/nowhere', 'failed', 1, NULL,
    1.0, 2.0, 'why', 0
);
INSERT INTO metrics VALUES (1, 'old', 'loss', 3, 0.5, NULL, 7);
"""


def test_a_ledger_from_before_sweeps_is_upgraded_once_and_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(VERSION_1)
    connection.close()
    for _ in range(2):  # the second time there is nothing to upgrade
        ledger = Ledger(f"sqlite:///{path}")
        run = ledger.run("old")
        assert (run.status, run.error, run.sweep_id, run.seconds) == ("failed", "why", None, 0.0)
        assert ledger.provenance(run) == {"code_version": "c"}
        assert ledger.history("old", "loss") == [(3, 0.5)]
        assert ledger.sweeps.newest() == []
    assert ledger.begin_attempt("old") == 2
    ledger.set_status("old", "finished")
    assert ledger.run("old").seconds >= 0.0
    with pytest.raises(BadInput, match="no sweep has id 'x'"):
        ledger.sweeps.get("x")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l.db").write_bytes(b"junk" * 4000)
    refused(lambda: Ledger(url(tmp_path / "l.db")), "file is not a database", "move the file away")
    assert (tmp_path / "l.db").read_bytes() == b"junk" * 4000


def test_damaged_pages_are_one_line(ledger: Ledger, tmp_path: Path) -> None:
    ledger.apply(Message("run", 1, 1, tuple(Row("x", n, 0.0, 0) for n in range(2000))))
    ledger.engine.dispose()
    path = tmp_path / "ledger.db"
    plain = sqlite3.connect(path)
    plain.execute("pragma wal_checkpoint(truncate)")
    plain.close()
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    refused(lambda: Ledger(url(path)).run("run"), "malformed", "move the file away")


def test_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    fix = "set PISTE_HOME or PISTE_LEDGER to a place that can be written"
    refused(lambda: Ledger(url(tmp_path / "file" / "sub" / "l.db")), "Not a directory", fix)
    refused(lambda: Ledger(url(tmp_path)), "unable to open database file", fix)


def test_a_place_where_no_lock_can_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piste.ledger.database, "BUSY_SECONDS", 0.1)
    (tmp_path / "l.db.lock").mkdir()
    refused(lambda: Ledger(url(tmp_path / "l.db")), "set PISTE_HOME or PISTE_LEDGER")


@pytest.mark.parametrize("bad", ["nonsense", "foo://me:secret@host/x", "postgresql+nodriver://me:secret@h/x"])
def test_a_url_that_is_none_is_refused_without_its_password(bad: str) -> None:
    with pytest.raises(LedgerError, match="not a usable SQLAlchemy URL") as caught:
        Ledger(bad)
    assert "secret" not in str(caught.value)


def test_a_locked_database_is_one_line(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piste.ledger.database, "BUSY_SECONDS", 0.1)
    quick = Ledger(ledger.url)
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    words = ("database is locked", "another process has held it for 0.1 s; end it and try again")
    message = Message("run", 1, 1, (Row("loss", 1, 1.0, 0),))
    refused(lambda: quick.apply(message), *words)
    refused(lambda: Ledger(ledger.url), *words)
    assert recorded(quick) == [], "a reader is not locked out, and nothing of the message is there"
    other.execute("ROLLBACK")
    other.close()
    assert quick.apply(message) == 1
    assert len(recorded(quick)) == 1


def test_a_full_database_is_one_line_and_takes_no_half_message(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:  # the pool's one connection, which the writer uses too
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
    message = Message("run", 1, 1, tuple(Row("x", n, 0.5, 0) for n in range(1000)))
    refused(lambda: ledger.apply(message), "disk is full", "free disk space, then `piste resume` continues")
    assert recorded(ledger) == []
    with ledger.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    assert ledger.apply(message) == 1
    assert len(recorded(ledger)) == 1000


def test_the_ledger_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISTE_HOME", str(tmp_path))
    assert default_url() == f"sqlite:///{tmp_path}/ledger.db"
    monkeypatch.setenv("PISTE_LEDGER", "postgresql://host/piste")
    assert default_url() == "postgresql://host/piste"


# -- many processes -------------------------------------------------------------------------------------

TOGETHER = """
import os, resource, sys
from piste.ledger import Ledger, LedgerError, Message, Row

URL = sys.argv[1]
COLUMNS = dict.fromkeys(("recipe", "workload", "identity", "cell", "directory"), "x")
COLUMNS |= {"seed": 0, "config": {}, "provenance": {}}

def together(count, act):
    gate, starter = os.pipe()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            os.close(starter)
            os.read(gate, 1)  # ends when the parent closes its end: all start at once
            try:
                act(number)
                os._exit(0)
            except BaseException as error:
                print(type(error).__name__, error, file=sys.stderr, flush=True)
                os._exit(1)
        children.append(child)
    os.close(gate), os.close(starter)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count
"""


def in_a_process(tmp_path: Path, script: str) -> Ledger:
    target = url(tmp_path / "new" / "ledger.db")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TOGETHER + script, target],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return Ledger(target)


def test_processes_open_an_absent_ledger_at_once(tmp_path: Path) -> None:
    script = "together(4, lambda n: Ledger(URL).create(id=f'run-{n}', **COLUMNS))"
    ledger = in_a_process(tmp_path, script)
    assert {run.id for run in ledger.runs()} == {f"run-{n}" for n in range(4)}


def test_processes_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    script = """
def write(number):
    ledger = Ledger(URL)
    ledger.create(id=f"run-{number}", **COLUMNS)
    attempt = ledger.begin_attempt(f"run-{number}")
    for part in range(10):
        rows = tuple(Row("x", step, float(number), step) for step in range(100 * part, 100 * part + 100))
        assert ledger.apply(Message(f"run-{number}", attempt, part, rows)) == part

together(8, write)
"""
    ledger = in_a_process(tmp_path, script)
    for n in range(8):
        assert ledger.history(f"run-{n}", "x") == [(step, float(n)) for step in range(1000)]


def test_processes_that_lose_double_and_reorder_their_messages_lose_and_double_no_metric(
    tmp_path: Path,
) -> None:
    script = """
import random

def write(number):
    chance, ledger = random.Random(number), Ledger(URL)
    ledger.create(id=f"run-{number}", **COLUMNS)
    attempt = ledger.begin_attempt(f"run-{number}")
    parts = [range(50 * part, 50 * part + 50) for part in range(10)]
    messages = [
        Message(f"run-{number}", attempt, n, tuple(Row("x", step, step / 3, step) for step in part))
        for n, part in enumerate(parts)
    ]
    waiting = messages + chance.sample(messages, 5)  # doubled
    chance.shuffle(waiting)  # reordered
    while waiting:
        message = waiting.pop()
        if chance.random() < 0.3:  # lost on the way there: sent again, later
            waiting.insert(0, message)
            continue
        assert ledger.apply(message) == message.sequence
        if chance.random() < 0.3:  # its acknowledgement lost: sent again, later
            waiting.insert(0, message)

together(4, write)
"""
    ledger = in_a_process(tmp_path, script)
    for n in range(4):
        assert ledger.history(f"run-{n}", "x") == [(step, step / 3) for step in range(500)]
        assert ledger.count_after(f"run-{n}") == 500
        assert ledger.run(f"run-{n}").recomputed_different == 0


def test_a_full_disk_is_one_line_and_writing_goes_on_after_it(tmp_path: Path) -> None:
    script = """
ledger = Ledger(URL)
ledger.create(id="run", **COLUMNS)
ledger.begin_attempt("run")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
refusals = []
for part in range(20):
    rows = tuple(Row("x", 1000 * part + n, 1.0, 0) for n in range(1000))
    message = Message("run", 1, part, rows)
    try:
        ledger.apply(message)
    except LedgerError as error:
        refusals.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert ledger.apply(message) == part
assert len(refusals) == 1 and "piste resume" in refusals[0] and "\\n" not in refusals[0], refusals
"""
    assert in_a_process(tmp_path, script).count_after("run") == 20_000
