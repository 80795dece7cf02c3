"""Messages between buffer and writer that are lost, doubled or late: no metric is lost or doubled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.faults.disturbed import rows_of

from piste.buffer import MetricBuffer
from piste.ledger import Ledger, Message

FAULTS = ("none", "lost", "unanswered", "doubled", "late")


class Wire:
    """Delivers messages to a ledger, with faults.

    Args:
        ledger: The ledger.
        faults: What befalls each message that is sent: it is lost, arrives but its answer does not, arrives
            twice, or is given up and arrives late, after messages that were sent behind it.
    """

    def __init__(self, ledger: Ledger, faults: Iterator[str]) -> None:
        self._ledger = ledger
        self._faults = faults
        self._late: list[Message] = []

    def send(self, message: Message) -> int:
        fault = next(self._faults, "none")
        if fault == "late":
            self._late.append(message)
        if fault in ("lost", "late"):
            raise ConnectionError("no answer")
        for _ in range(2 if fault == "doubled" else 1):
            answer = self._ledger.apply(message)
        if fault == "unanswered":
            raise TimeoutError("no answer")
        return answer

    def deliver_late(self) -> None:
        """What was under way arrives, the last one first."""
        while self._late:
            self._ledger.apply(self._late.pop())


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path_factory.mktemp('messages') / 'ledger.db'}")


@pytest.fixture(scope="module", autouse=True)
def impatient() -> Iterator[None]:
    """A message is repeated at once, and none is sent that is not flushed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("piste.buffer.PAUSE_SECONDS", 0.0)
        patch.setattr("piste.buffer.FLUSH_SECONDS", 3600.0)
        yield


numbers = itertools.count()


@given(
    # Of each attempt: how many steps it takes, and after how many of them it flushes.
    attempts=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 7)), min_size=1, max_size=3),
    faults=st.lists(st.sampled_from(FAULTS), max_size=40),
    between=st.booleans(),
)
def test_every_metric_is_there_once(
    ledger: Ledger, attempts: list[tuple[int, int]], faults: list[str], between: bool
) -> None:
    """Each attempt is cut off, and the next goes on from the last flush; what was under way comes later."""
    run_id = f"run-{next(numbers)}"
    columns = {"recipe": "", "workload": "", "seed": 0, "config": {}, "provenance": {}, "directory": ""}
    ledger.create(id=run_id, identity="", cell="", **columns)
    wire = Wire(ledger, iter(faults))
    done = 0
    for number, (steps, every) in enumerate(attempts, start=1):
        buffer = MetricBuffer(wire.send, run_id, ledger.begin_attempt(run_id))
        if between:
            wire.deliver_late()
        last = done + steps
        for step in range(done + 1, last + 1):
            buffer.append({"loss": step / 3, "norm": -float(step)}, step)
            if step % every == 0 or (step == last and number == len(attempts)):
                buffer.flush()
                done = step
        buffer._rows.clear()  # the attempt is cut off: what it has not sent is lost with it
        buffer.close()
    wire.deliver_late()
    whole = range(1, done + 1)
    assert ledger.history(run_id, "loss") == [(step, step / 3) for step in whole]
    assert ledger.history(run_id, "norm") == [(step, -float(step)) for step in whole]
    assert rows_of(ledger, run_id) == 2 * len(whole)
    assert ledger.run(run_id).recomputed_different == 0
