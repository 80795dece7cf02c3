"""Streams: nothing is touched without an alarm, a shift is adapted to, the source is restored."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from tests.algorithms.score_laws import most_successes
from tests.algorithms.shifted_task import WIDTH, Task
from torch import Tensor

from piste_algorithms.adaptation import AdaptiveStream, FisherPrompt
from piste_algorithms.martingales import FisherScore, ShiftDetector


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained() -> Task:
    return Task(0, shift=8.0)


@pytest.fixture
def task(trained: Task) -> Task:
    trained.generator.manual_seed(1)  # the same draws, whatever ran before
    return trained


def build(task: Task, source: Tensor, **options: int) -> AdaptiveStream:
    """A stream with its own source sample: for the score, the adapter and the calibration."""
    score = FisherScore(task.network, source[:500])
    detector = ShiftDetector(two_sided=True)  # a shift that costs confidence lowers the score
    detector.calibrate(score(source[500:]))
    adapter = FisherPrompt(task.model, torch.zeros(WIDTH, dtype=torch.float64))
    adapter.fit_source(source[:500])
    return AdaptiveStream(detector, adapter, score, **options)


def test_without_an_alarm_predictions_are_the_sources_to_the_last_bit(task: Task) -> None:
    runs, adapted = 40, 0
    for _ in range(runs):
        stream = build(task, task.draw(1000)[0])
        for _ in range(10):
            batch = task.draw(200)[0]
            logits = stream.process(batch)
            if not stream.alarms:
                assert torch.equal(logits, task.network(batch))
                assert stream.steps_taken == []
                assert torch.equal(stream.adapter.prompt, torch.zeros(WIDTH, dtype=torch.float64))
        adapted += stream.adapted
    assert adapted <= most_successes(runs, 0.05)


def test_a_shift_is_found_adapted_to_and_forgotten_when_the_source_is_back(task: Task) -> None:
    stream = build(task, task.draw(2500)[0], steps=25, return_after=1000)
    accuracies = {"source": 0.0, "shifted": 0.0, "back": 0.0}
    for _ in range(20):
        batch, y = task.draw(64)
        accuracies["source"] += task.accuracy(stream.process(batch), y) / 20
    assert not stream.adapted
    for index in range(40):
        batch, y = task.draw(64, shifted=True)
        logits = stream.process(batch)
        if index >= 30:
            accuracies["shifted"] += task.accuracy(logits, y) / 10
    assert stream.adapted
    assert abs(stream.alarms[0].onset - 20 * 64) < 64
    unadapted = task.accuracy(task.network(batch), y)
    assert accuracies["shifted"] > max(unadapted + 0.02, accuracies["source"] - 0.02)
    for _ in range(60):
        batch, y = task.draw(64)
        logits = stream.process(batch)
    assert not stream.adapted
    assert torch.equal(logits, task.network(batch))


def test_a_saved_stream_continues_bit_for_bit(task: Task) -> None:
    source = task.draw(2500)[0]
    batches = [task.draw(64, shifted=index >= 4)[0] for index in range(12)]
    whole, before, after = (build(task, source, steps=3, return_after=500) for _ in range(3))
    expected = [whole.process(batch) for batch in batches]
    for batch in batches[:7]:
        before.process(batch)
    assert before.adapted
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file))
    for batch, logits in zip(batches[7:], expected[7:], strict=True):
        assert torch.equal(after.process(batch), logits)


def test_bad_arguments_are_named(task: Task) -> None:
    source = task.draw(1000)[0]
    with pytest.raises(ValueError, match="steps must be an integer >= 1"):
        build(task, source, steps=0)
    with pytest.raises(ValueError, match="return_after must be an integer >= 1"):
        build(task, source, return_after=0)
