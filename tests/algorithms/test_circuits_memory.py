"""What learning holds: the parameters and the activations of one layer, not of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import piste_algorithms.circuits.circuit as circuit_module
from piste_algorithms.circuits import Anemone, Circuit, hclt, hmm


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that torch holds at once during a call, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    "make",
    [
        lambda: hmm(32, 64, 16),
        lambda: hmm(64, 64, 16),
        lambda: hclt(torch.randint(4, (200, 40), generator=torch.Generator().manual_seed(0)), 32),
    ],
    ids=["hmm", "hmm twice as long", "hclt"],
)
def test_an_update_holds_four_times_parameters_and_one_layer(
    make: Callable[[], Circuit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything in an update of Anemone, without the 4 MiB that a piece may hold in any case."""
    monkeypatch.setattr(circuit_module, "_CPU_PIECE_BYTES", 0)
    circuit = make()
    x = torch.randint(4, (64, circuit.variables), generator=torch.Generator().manual_seed(1))
    rule = Anemone(circuit)
    rule.step(x)
    parameters = sum(table.nbytes for table in circuit.tables.values())
    layer = len(x) * circuit._engine.layer_entries * circuit.dtype.itemsize
    assert parameters + peak_bytes(lambda: rule.step(x)) <= 4 * (parameters + layer)
