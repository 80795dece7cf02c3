"""The metric buffer: every row arrives once and in order, whatever the way to the writer does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

import piste.buffer
from piste.buffer import MetricBuffer
from piste.errors import PisteError
from piste.ledger import Message, Row


class Writer:
    """A writer that ignores what it has, behind a transport that goes through a list of faults.

    Each call of `send` takes the next fault: "refuse" and "break" raise without delivering, "forget"
    delivers and raises (the acknowledgement is lost), "twice" delivers twice, "confuse" delivers and
    acknowledges another message; anything else, and the end of the list, is an undisturbed delivery.
    """

    def __init__(self, faults: str = "") -> None:
        self.faults = iter(faults.split())
        self.first: dict[tuple[str, int], Row] = {}
        self.artifacts: list[str] = []
        self.delivered: list[Message] = []

    def send(self, message: Message) -> int:
        fault = next(self.faults, "")
        if fault == "refuse":
            raise PisteError("the disk is full: free some")
        if fault == "break":
            raise ConnectionResetError("the actor has gone")
        for _ in range(2 if fault == "twice" else 1):
            self.delivered.append(message)
            for row in message.rows:
                self.first.setdefault((row.key, row.step), row)
            self.artifacts += [a["name"] for a in message.artifacts]
        if fault == "forget":
            raise TimeoutError("no answer")
        return message.sequence - (fault == "confuse")


Make = Callable[..., MetricBuffer]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[MetricBuffer] = []

    def build(send: Callable[[Message], int], **options: object) -> MetricBuffer:
        made.append(MetricBuffer(send, "run", 1, **options))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for buffer in made:
        buffer._closing = True
        buffer._wake.set()
        buffer._thread.join(10)
        assert not buffer._thread.is_alive()


@pytest.mark.parametrize(
    "faults",
    ["", "forget ok forget", "twice twice ok twice", "refuse refuse", "break ok break", "confuse forget",
     "refuse break forget twice ok confuse ok"],
)  # fmt: skip
def test_every_row_arrives_in_the_order_it_was_taken(make: Make, faults: str) -> None:
    writer = Writer(faults)
    buffer = make(writer.send)
    taken = []
    for step in range(1600):
        buffer.append({"loss": step / 7, "norm": float(step)}, step)
        taken += [("loss", step, step / 7), ("norm", step, float(step))]
    buffer.close()
    assert [(r.key, r.step, r.value) for r in writer.first.values()] == taken
    assert next(writer.faults, None) is None, "the faults were not all met"
    assert {(m.run_id, m.attempt) for m in writer.delivered} == {("run", 1)}


def test_a_message_is_repeated_under_its_number_and_the_next_has_a_greater_one(make: Make) -> None:
    writer = Writer("forget forget ok forget")
    buffer = make(writer.send)
    for step in range(2500):
        buffer.append({"loss": 0.0}, step)
    buffer.close()
    numbers = [m.sequence for m in writer.delivered]
    assert numbers == sorted(numbers)
    assert numbers[0] == numbers[1] == numbers[2]
    for message in writer.delivered:
        assert all(m == message for m in writer.delivered if m.sequence == message.sequence)


def test_append_returns_while_the_writer_hangs_and_flush_waits(make: Make) -> None:
    entered, released = threading.Event(), threading.Event()
    writer = Writer()

    def hang(message: Message) -> int:
        entered.set()
        assert released.wait(30)
        return writer.send(message)

    buffer = make(hang)
    for step in range(5000):
        buffer.append({"loss": 1.0}, step)
    assert entered.wait(10)
    assert not writer.first, "append was to return before anything is acknowledged"
    flushed = threading.Event()

    def flush() -> None:
        buffer.flush()
        flushed.set()

    flusher = threading.Thread(target=flush)
    flusher.start()
    assert not flushed.wait(0.1)
    released.set()
    flusher.join(30)
    assert flushed.is_set()
    assert len(writer.first) == 5000


def test_rows_are_sent_without_being_asked_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piste.buffer, "FLUSH_SECONDS", 0.01)
    arrived = threading.Event()

    def send(message: Message) -> int:
        if any(row.key == "loss" for row in message.rows):
            arrived.set()
        return message.sequence

    make(send).append({"loss": 1.0}, 0)
    assert arrived.wait(10)


def test_five_hundred_rows_are_sent_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piste.buffer, "FLUSH_SECONDS", 3600.0)
    arrived = threading.Event()

    def send(message: Message) -> int:
        arrived.set()
        return message.sequence

    buffer = make(send)
    for step in range(499):
        buffer.append({"loss": 1.0}, step)
    assert not arrived.wait(0.1)
    buffer.append({"loss": 1.0}, 499)
    assert arrived.wait(10)


@pytest.mark.parametrize("error", [PisteError("the disk is full: free some"), OSError("the wire is cut")])
def test_it_gives_up_with_the_rows_kept(make: Make, error: Exception) -> None:
    def refuse(_message: Message) -> int:
        raise error

    buffer = make(refuse, retry_seconds=0.0)
    for step in range(10):
        buffer.append({"loss": float(step)}, step)
    for act in (buffer.flush, lambda: buffer.append({"loss": 0.0}, 11), buffer.close):
        with pytest.raises(PisteError, match=str(error)) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert [row.step for row in buffer._rows] == list(range(10))


def test_it_repeats_for_as_long_as_it_was_told(make: Make) -> None:
    calls = []

    def refuse(message: Message) -> int:
        calls.append(message.sequence)
        raise PisteError("no")

    buffer = make(refuse, retry_seconds=0.3)
    buffer.append({"loss": 1.0}, 0)
    with pytest.raises(PisteError, match="no"):
        buffer.flush()
    assert len(calls) >= 3
    assert len(set(calls)) == 1


def test_files_and_samples_go_the_same_way(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piste.buffer, "FLUSH_SECONDS", 0.01)
    writer, sampled, steps = Writer("refuse"), threading.Event(), iter(range(10**9))

    def sample() -> tuple[dict[str, float], int]:
        if (step := next(steps)) == 3:
            sampled.set()
        return {"system/cpu": 0.5}, step

    buffer = make(writer.send, sample=sample)
    buffer.artifact({"name": "loss.png"})
    assert not sampled.wait(0.2), "sampling begins with the first metric"
    buffer.append({"loss": 1.0}, 0)
    assert sampled.wait(10)
    buffer.close()
    assert writer.artifacts == ["loss.png"]
    assert next(iter(writer.first)) == ("loss", 0)
    assert [("system/cpu", n) in writer.first for n in range(3)] == [True] * 3


def test_close_ends_the_thread_and_delivers_the_rest(make: Make) -> None:
    writer = Writer()
    buffer = make(writer.send)
    thread = buffer._thread
    assert thread in threading.enumerate()
    buffer.append({"loss": 1.0}, 0)
    buffer.close()
    assert thread not in threading.enumerate()
    assert list(writer.first) == [("loss", 0)]
