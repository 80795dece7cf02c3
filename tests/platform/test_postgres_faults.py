"""PostgreSQL dies while it is written to: nothing is lost or doubled, and a run comes out the same."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import func, select
from tests.platform.driving import (
    assert_same_weights,
    end,
    paced_recipe,
    start_piste,
    steps_taken,
    wait_until,
)
from tests.platform.ledgers import COLUMNS, recorded, together
from tests.platform.postgres_server import Postgres

from piste.ledger import Ledger, Message, Metric, Row
from piste.running import run
from piste.tracking import client

pytest_plugins = ["tests.platform.fixtures", "tests.platform.postgres"]

pytestmark = pytest.mark.fault

WRITERS, METRICS = 8, 5000
WRITE = """
from piste.buffer import MetricBuffer

def write(number):
    ledger = Ledger(URL)
    ledger.create(id=f"run-{number}", **COLUMNS)
    attempt = ledger.begin_attempt(f"run-{number}")
    buffer = MetricBuffer(ledger.apply, f"run-{number}", attempt)
    for step in range(5000):
        buffer.append({"x": number + step / 7}, step)
        if step % 50 == 49:
            buffer.flush()
    buffer.close()
    ledger.set_status(f"run-{number}", "finished")

together(8, write)
"""


def test_eight_writers_count_exactly_while_the_database_dies(postgres: Postgres, postgres_url: str) -> None:
    ledger = Ledger(postgres_url)
    writers = together(postgres_url, WRITE)

    def counted() -> int:
        with ledger.reading() as connection:
            return int(connection.execute(select(func.count()).select_from(Metric)).scalar_one())

    wait_until(lambda: counted() > WRITERS * METRICS / 4, "a quarter is written")
    postgres.restart()
    assert counted() < WRITERS * METRICS / 2, "it died too late"
    code, _, err = end(writers)
    assert (code, err) == (0, "")
    assert counted() == WRITERS * METRICS
    for number in range(WRITERS):
        found = ledger.run(f"run-{number}")
        assert (found.status, found.attempt, found.recomputed_different) == ("finished", 1, 0)
        expected = [(step, number + step / 7) for step in range(METRICS)]
        assert ledger.history(found.id, "x") == expected
        rows = ledger.metrics_after(found.id, 0, METRICS + 1)
        assert [row.step for row in rows] == list(range(METRICS)), "the relay sees them in their order"


@pytest.mark.parametrize("words", [["--local"], []], ids=["local", "ray"])
def test_a_run_outlives_the_database(
    postgres: Postgres, postgres_url: str, shown_home: Path, tmp_path: Path, words: list[str]
) -> None:
    """The database is away for two seconds of a run's steps, and over one of its checkpoints."""
    plain, disturbed = tmp_path / "plain", tmp_path / "disturbed"
    recipe = paced_recipe(disturbed, hold_at=8)
    process = start_piste(shown_home, "run", recipe, "--json", *words, ledger=postgres_url)
    wait_until(lambda: bool(steps_taken(disturbed)) and steps_taken(disturbed)[-1][0] == 8, "step 8 begins")
    postgres.stop()
    (disturbed / "go").touch()
    wait_until(lambda: steps_taken(disturbed)[-1][0] == 10, "it goes on to the checkpoint after step 10")
    back = threading.Timer(2.0, postgres.start)
    back.start()
    code, out, err = end(process)
    back.join()
    assert code == 0, (out, err)
    ledger = Ledger(postgres_url)
    (row,) = ledger.runs()
    undisturbed = run(paced_recipe(plain), local=True)
    assert (row.status, row.attempt, row.recomputed_different) == ("finished", 1, 0)
    assert ledger.history(row.id, "train/loss") == undisturbed.history("train/loss")
    assert [step for step, _ in steps_taken(disturbed)] == list(range(1, 21))
    assert_same_weights(Path(row.directory), undisturbed.directory)
    view = client(f"sqlite:///{shown_home / 'mlflow.db'}")
    (shown,) = view.search_runs(["1"], f"tags.`piste.run_id` = '{row.id}'")
    assert shown.info.status == "FINISHED"
    points = view.get_metric_history(shown.info.run_id, "train/loss")
    assert sorted((p.step, p.value) for p in points) == undisturbed.history("train/loss")


HANG = """
from sqlalchemy import event

ledger = Ledger(URL)

def hang(connection):
    print("open", flush=True)
    os.kill(os.getpid(), 19)  # SIGSTOP, as a host that is cut off

event.listen(ledger.engine, "commit", hang, once=True)
ledger.apply(Message("run", 1, 1, (Row("loss", 1, 1.0, 0),)))
"""


def test_a_writer_that_hangs_does_not_hold_up_the_next(postgres_url: str) -> None:
    ledger = Ledger(postgres_url)
    ledger.create(id="run", **COLUMNS)
    ledger.begin_attempt("run")
    hanging = together(postgres_url, HANG)
    try:
        assert hanging.stdout is not None
        assert hanging.stdout.readline() == "open\n"
        begun = time.monotonic()
        ledger.apply(Message("run", 1, 1, (Row("loss", 2, 2.0, 0),)))
        assert time.monotonic() - begun < 30
        assert recorded(ledger) == [("loss", 2, 2.0, 0)]
        os.kill(hanging.pid, signal.SIGCONT)
        code, _, err = end(hanging, 60)
    finally:
        hanging.kill()
    assert (code, err) == (0, "")
    assert recorded(ledger) == [("loss", 2, 2.0, 0), ("loss", 1, 1.0, 0)]
