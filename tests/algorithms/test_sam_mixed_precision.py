"""The SAM family with gradient accumulation, a gradient scaler, and half precision."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.algorithms.sharpness import (
    FAMILY,
    Batch,
    Build,
    batches,
    closure_of,
    network,
    sgd,
    spoiled,
    weights,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from piste_algorithms.optimizers import SAM

every_member = pytest.mark.parametrize("build", FAMILY.values(), ids=FAMILY)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@every_member
def test_gradient_accumulation(build: Build) -> None:
    """Four micro-batches a step are one batch of their sizes' sum."""
    whole, parts = network(), network()
    optimizer, accumulating = build(sgd(whole)), build(sgd(parts))
    for inputs, labels in batches(12):

        def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> float:
            accumulating.zero_grad()
            total = 0.0
            for part, targets in zip(inputs.chunk(4), labels.chunk(4), strict=True):
                loss = cross_entropy(parts(part), targets) / 4
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            return total

        loss = accumulating.step(closure)
        assert loss == pytest.approx(float(optimizer.step(closure_of(optimizer, whole, (inputs, labels)))))
        torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-12)
    assert optimizer.sam_steps == accumulating.sam_steps


def scaled(
    scaler: torch.amp.GradScaler, optimizer: Any, model: nn.Module, batch: Batch, factor: float = 1.0
) -> Callable[[], Tensor]:
    """The closure that `sam.py` recommends for float16; `factor` multiplies the loss."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = factor * cross_entropy(model(batch[0]), batch[1])
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() < scale:
            optimizer.zero_grad()
        return loss.detach()

    return closure


@every_member
def test_a_gradient_scaler_changes_nothing(build: Build) -> None:
    """Scales are powers of two: without an overflow the unscaled gradients are the gradients, bit for bit."""
    data = batches(12, dtype=torch.float32)
    model, plain = network(dtype=torch.float32), network(dtype=torch.float32)
    optimizer, reference = build(sgd(model)), build(sgd(plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    for batch in data:
        optimizer.step(scaled(scaler, optimizer, model, batch))
        reference.step(closure_of(reference, plain, batch))
        assert torch.equal(weights(model), weights(plain))
    assert scaler.get_scale() > 2.0**10


@every_member
def test_an_overflow_leaves_the_step_out(build: Build) -> None:
    """Gradients of about 64 times 2^127 are infinite; the scale is halved until they are not."""
    model = network(dtype=torch.float32)
    optimizer = build(sgd(model, lr=0.1 / 64))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before, left_out = weights(model), 0
    for batch in batches(40, dtype=torch.float32):
        optimizer.step(scaled(scaler, optimizer, model, batch, factor=64.0))
        left_out += torch.equal(weights(model), before)
    assert 2 <= left_out <= 20
    assert scaler.get_scale() < 2.0**126
    assert weights(model).isfinite().all()


@every_member
def test_an_overflow_in_the_second_pass_leaves_the_base_step(build: Build) -> None:
    model, plain, [batch] = network(), network(), batches(1)
    optimizer, base = build(sgd(model)), sgd(plain)
    optimizer.step(spoiled(optimizer, model, batch, optimizer.zero_grad))  # what the closure above does
    base.step(closure_of(base, plain, batch))
    assert torch.equal(weights(model), weights(plain))


@every_member
def test_bfloat16_autocast(build: Build) -> None:
    data = batches(60, dtype=torch.float32)
    model = network(dtype=torch.float32)
    optimizer = build(sgd(model))

    def loss_of(batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cross_entropy(model(batch[0]), batch[1])

    start = sum(float(loss_of(batch).detach()) for batch in data)
    for batch in data:

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)
    assert sum(float(loss_of(batch).detach()) for batch in data) < 0.8 * start


def test_norms_of_half_precision_gradients_are_summed_in_float32() -> None:
    """2^12 entries of 1 have a norm of 64, which a bfloat16 sum of squares does not reach."""
    parameter = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    other = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = SAM(torch.optim.SGD([parameter, other], lr=1.0), rho=64.0)
    seen = []

    def closure() -> None:
        optimizer.zero_grad()
        seen.append(parameter.detach().clone())
        (parameter.sum() + 0 * other.sum()).backward()  # type: ignore[no-untyped-call]

    optimizer.step(closure)
    assert torch.equal(seen[1], torch.ones(4096, dtype=torch.bfloat16))
