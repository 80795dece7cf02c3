"""One ledger, many processes: created and upgraded once, and every metric counted exactly once."""

from __future__ import annotations

from pathlib import Path

from tests.platform.driving import end
from tests.platform.ledgers import make_old, together

from piste.ledger import Ledger

pytest_plugins = ["tests.platform.postgres"]


def in_a_process(ledger_url: str, script: str) -> Ledger:
    code, _, err = end(together(ledger_url, script), 120)
    assert (code, err) == (0, "")
    return Ledger(ledger_url)


def test_processes_open_an_absent_ledger_at_once(ledger_url: str) -> None:
    script = "together(4, lambda n: Ledger(URL).create(id=f'run-{n}', **COLUMNS))"
    ledger = in_a_process(ledger_url, script)
    assert {run.id for run in ledger.runs()} == {f"run-{n}" for n in range(4)}


def test_processes_write_at_once_and_nothing_is_lost(ledger_url: str) -> None:
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
    ledger = in_a_process(ledger_url, script)
    for n in range(8):
        assert ledger.history(f"run-{n}", "x") == [(step, float(n)) for step in range(1000)]


def test_processes_that_lose_double_and_reorder_their_messages_lose_and_double_no_metric(
    ledger_url: str,
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
    ledger = in_a_process(ledger_url, script)
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
    assert in_a_process(f"sqlite:///{tmp_path / 'ledger.db'}", script).count_after("run") == 20_000


def test_processes_upgrade_an_old_ledger_at_once(ledger_url: str) -> None:
    make_old(Ledger(ledger_url))
    script = "together(4, lambda n: Ledger(URL).create(id=f'run-{n}', **COLUMNS))"
    ledger = in_a_process(ledger_url, script)
    assert {run.id for run in ledger.runs()} == {"old", *(f"run-{n}" for n in range(4))}
    assert ledger.history("old", "loss") == [(3, 0.5)]
