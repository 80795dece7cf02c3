"""The ledger: what is sent is recorded once, and what goes wrong is one line."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.platform.ledgers import COLUMNS, make_old, recorded, refused

import piste.ledger.faults
from piste.errors import BadInput
from piste.ledger import Ledger, LedgerError, Message, Row, default_url

pytest_plugins = ["tests.platform.postgres"]


def sqlite_url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def ledger(ledger_url: str) -> Ledger:
    return begun(ledger_url)


@pytest.fixture
def in_a_file(tmp_path: Path) -> Ledger:
    """One in SQLite, whose file a test opens itself."""
    return begun(sqlite_url(tmp_path / "ledger.db"))


def begun(url: str) -> Ledger:
    made = Ledger(url)
    made.create(id="run", **COLUMNS)
    made.begin_attempt("run")
    return made


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


def test_the_first_of_each_key_and_step_stays(ledger_url: str) -> None:
    ledger, numbers = Ledger(ledger_url), count()

    @settings(max_examples=60)
    @given(arriving=_deliveries())
    def holds(arriving: list[tuple[Row, ...]]) -> None:
        run_id = f"run-{next(numbers)}"
        ledger.create(id=run_id, **COLUMNS)
        attempt = ledger.begin_attempt(run_id)
        kept: dict[tuple[str, int], tuple[float, int]] = {}
        different = 0
        for sequence, rows in enumerate(arriving, start=1):
            assert ledger.apply(Message(run_id, attempt, sequence, rows)) == sequence
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
        assert [(k, s, repr(v), t) for k, s, v, t in recorded(ledger, run_id)] == expected
        assert ledger.run(run_id).recomputed_different == different

    holds()


def test_values_that_are_not_finite_come_back(ledger: Ledger) -> None:
    values = [math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, 0.1, -1e300]
    ledger.apply(Message("run", 1, 1, tuple(Row("x", n, v, 0) for n, v in enumerate(values))))
    assert [repr(v) for _, v in ledger.history("run", "x")] == [repr(v) for v in values]
    assert ledger.last_values("run") == {"x": -1e300}


def test_reading_back_agrees_with_what_was_sent(ledger: Ledger) -> None:
    rows = tuple(Row(key, step, step / 3, 7) for step in (2, 0, 1) for key in ("b", "a"))
    ledger.apply(Message("run", 1, 1, rows))
    assert ledger.keys("run") == ["a", "b"]
    assert ledger.history("run", "a") == [(0, 0.0), (1, 1 / 3), (2, 2 / 3)]
    assert ledger.last_values("run") == {"a": 2 / 3, "b": 2 / 3}
    first = ledger.metrics_after("run", 0, 4)
    assert [(m.key, m.step) for m in first] == [("b", 2), ("a", 2), ("b", 0), ("a", 0)]
    assert ledger.count_after("run", first[-1].id) == 2
    with ledger.engine.connect() as plain:
        found = plain.exec_driver_sql("SELECT key, step, value, timestamp FROM metrics ORDER BY id")
        assert [tuple(row) for row in found] == list(rows)


def test_a_file_is_in_wal_mode(in_a_file: Ledger, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as plain:
        assert plain.execute("pragma journal_mode").fetchone() == ("wal",)


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


def test_a_newer_schema_is_refused(ledger: Ledger) -> None:
    with ledger.engine.begin() as plain:
        plain.exec_driver_sql("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    refused(lambda: Ledger(ledger.url), "has schema version 99, newer than", "upgrade piste")


def test_a_ledger_from_before_sweeps_is_upgraded_once_and_keeps_what_it_has(ledger: Ledger) -> None:
    url = ledger.url
    make_old(ledger)
    for _ in range(2):  # the second time there is nothing to upgrade
        ledger = Ledger(url)
        run = ledger.run("old")
        assert (run.status, run.error, run.sweep_id, run.seconds) == ("failed", "why", None, 0.0)
        assert ledger.provenance(run) == {"code_version": "c"}
        assert ledger.history("old", "loss") == [(3, 0.5)]
        assert ledger.sweeps.newest() == []
        assert ledger.jobs.newest() == []
    assert ledger.begin_attempt("old") == 2
    assert ledger.apply(Message("old", 2, 1, (Row("loss", 4, 0.25, 8),))) == 1
    assert recorded(ledger, "old") == [("loss", 3, 0.5, 7), ("loss", 4, 0.25, 8)]
    ledger.set_status("old", "finished")
    assert ledger.run("old").seconds >= 0.0
    with pytest.raises(BadInput, match="no sweep has id 'x'"):
        ledger.sweeps.get("x")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l.db").write_bytes(b"junk" * 4000)
    refused(lambda: Ledger(sqlite_url(tmp_path / "l.db")), "file is not a database", "move the file away")
    assert (tmp_path / "l.db").read_bytes() == b"junk" * 4000


def test_damaged_pages_are_one_line(in_a_file: Ledger, tmp_path: Path) -> None:
    in_a_file.apply(Message("run", 1, 1, tuple(Row("x", n, 0.0, 0) for n in range(2000))))
    in_a_file.engine.dispose()
    path = tmp_path / "ledger.db"
    plain = sqlite3.connect(path)
    plain.execute("pragma wal_checkpoint(truncate)")
    plain.close()
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    refused(lambda: Ledger(sqlite_url(path)).run("run"), "malformed", "move the file away")


def test_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    fix = "set PISTE_HOME or PISTE_LEDGER to a place that can be written"
    refused(lambda: Ledger(sqlite_url(tmp_path / "file" / "sub" / "l.db")), "Not a directory", fix)
    refused(lambda: Ledger(sqlite_url(tmp_path)), "unable to open database file", fix)


def test_a_place_where_no_lock_can_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piste.ledger.faults, "BUSY_SECONDS", 0.1)
    (tmp_path / "l.db.lock").mkdir()
    refused(lambda: Ledger(sqlite_url(tmp_path / "l.db")), "set PISTE_HOME or PISTE_LEDGER")


@pytest.mark.parametrize(
    "bad",
    [
        "nonsense",
        "foo://me:secret@host/x",
        "postgresql+nodriver://me:secret@h/x",
        "postgresql:/me:secret@h/x",
        "postgresql://me:secret@h:port/x",
        "mysql://h/x?user=me&password=secret",
    ],
)
def test_a_url_of_no_ledger_is_refused_without_its_password(bad: str) -> None:
    refused(lambda: Ledger(bad), "use sqlite:///FILE or postgresql+psycopg://ROLE@HOST/DATABASE")
    with pytest.raises(LedgerError) as caught:
        Ledger(bad)
    assert "secret" not in str(caught.value)


def test_a_locked_database_is_one_line(
    in_a_file: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piste.ledger.faults, "BUSY_SECONDS", 0.1)
    quick = Ledger(in_a_file.url)
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    words = ("database is locked", "another process has held it for 0.1 s; end it and try again")
    message = Message("run", 1, 1, (Row("loss", 1, 1.0, 0),))
    refused(lambda: quick.apply(message), *words)
    refused(lambda: Ledger(in_a_file.url), *words)
    assert recorded(quick) == [], "a reader is not locked out, and nothing of the message is there"
    other.execute("ROLLBACK")
    other.close()
    assert quick.apply(message) == 1
    assert len(recorded(quick)) == 1


def test_a_full_database_is_one_line_and_takes_no_half_message(in_a_file: Ledger) -> None:
    with in_a_file.engine.connect() as connection:  # the pool's one connection, which the writer uses too
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
    message = Message("run", 1, 1, tuple(Row("x", n, 0.5, 0) for n in range(1000)))
    refused(
        lambda: in_a_file.apply(message), "disk is full", "free disk space, then `piste resume` continues"
    )
    assert recorded(in_a_file) == []
    with in_a_file.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    assert in_a_file.apply(message) == 1
    assert len(recorded(in_a_file)) == 1000


def test_the_ledger_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISTE_HOME", str(tmp_path))
    assert default_url() == f"sqlite:///{tmp_path}/ledger.db"
    monkeypatch.setenv("PISTE_LEDGER", "postgresql://host/piste")
    assert default_url() == "postgresql://host/piste"
