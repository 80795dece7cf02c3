"""LookSAM: against the paper written in float64, against the peer, and what its decomposition promises."""

import functools
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_optimizer
import torch
from tests.algorithms.sharpness import (
    WrittenSGD,
    batches,
    closure_of,
    gradient_at,
    network,
    sam_gradient,
    sgd,
    train,
    weights,
)
from torch import Tensor, nn

from piste_algorithms.optimizers import LookSAM
from piste_algorithms.optimizers.looksam import orthogonal_part


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.7), (3, 0.2), (1, 0.7)])
def test_equals_the_paper(k: int, alpha: float) -> None:
    """Algorithm 1 of Liu et al., written on one vector, in 23 steps: not a multiple of k."""
    model = network()
    written = WrittenSGD(weights(model), lr=0.02)
    optimizer = LookSAM(sgd(model, lr=0.02), rho=0.2, k=k, alpha=alpha)
    orthogonal = torch.zeros(0)
    for step, batch in enumerate(batches(23)):
        if step % k == 0:
            g, g_s = sam_gradient(network(), written.vector, batch, 0.2)
            cosine = g @ g_s / (g.norm() * g_s.norm())
            orthogonal = g_s - g_s.norm() * cosine * g / g.norm()
            written.step(g_s)
        else:
            g = gradient_at(network(), written.vector, batch)
            written.step(g + alpha * g.norm() / orthogonal.norm() * orthogonal)
        optimizer.step(closure_of(optimizer, model, batch))
        torch.testing.assert_close(weights(model), written.vector, rtol=0, atol=1e-12)
    assert optimizer.sam_steps == math.ceil(23 / k)
    assert optimizer.gradient_evaluations == 23 + optimizer.sam_steps


def test_equals_the_peer_on_one_tensor() -> None:
    """The peer decomposes each tensor by itself: with one tensor that is the same method."""
    target = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = nn.Parameter(torch.zeros_like(target)), nn.Parameter(torch.zeros_like(target))
    optimizer = LookSAM(torch.optim.SGD([ours], lr=0.05), rho=0.2, k=4, alpha=0.5)
    other: Any = pytorch_optimizer.LookSAM([theirs], torch.optim.SGD, lr=0.05, rho=0.2, k=4, alpha=0.5)

    def evaluate(parameter: nn.Parameter, optimizer: Any) -> Tensor:
        optimizer.zero_grad()
        loss = torch.cosh(parameter - target).sum() + 0.1 * parameter.sum() ** 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(30):
        optimizer.step(functools.partial(evaluate, ours, optimizer))
        evaluate(theirs, other)
        other.step(functools.partial(evaluate, theirs, other))
        # The peer's norm is rounded to float32, and 1e-8 is added to one of its divisors.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert float((ours - target).detach().norm()) < float(target.norm())


def test_the_kept_part_is_orthogonal_to_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), ()]
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    psf = [1e-3 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    g, p = (torch.cat([part.flatten() for part in parts]) for parts in (gradients, psf))
    kept = torch.cat([part.flatten() for part in orthogonal_part(psf, gradients, float(g.norm()))])
    assert abs(float(kept @ g)) <= 1e-15 * float(g.norm())
    # Pythagoras: what is left of g_s = g + PSF along g completes it.
    along = float((g + p) @ g / g.norm())
    assert float(kept.norm()) ** 2 + along**2 == pytest.approx(float((g + p).norm()) ** 2, rel=1e-14)


def test_parallel_gradients_leave_nothing_to_reuse() -> None:
    """A single weight: g_s is parallel to g, and what is left of it is rounding, never alpha ||g|| long."""
    parameter = nn.Parameter(torch.tensor([1.3]))
    plain = nn.Parameter(torch.tensor([1.3]))
    optimizer = LookSAM(torch.optim.SGD([parameter], lr=0.1), rho=0.1, k=5)
    base = torch.optim.SGD([plain], lr=0.1)

    def closure() -> None:
        optimizer.zero_grad()
        (parameter**4).sum().backward()  # type: ignore[no-untyped-call]

    optimizer.step(closure)
    with torch.no_grad():
        plain.copy_(parameter)
    for _ in range(4):
        optimizer.step(closure)
        base.zero_grad()
        (plain**4).sum().backward()  # type: ignore[no-untyped-call]
        base.step()
        assert torch.equal(parameter, plain)


def test_a_zero_gradient_is_no_division_by_zero() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = LookSAM(torch.optim.SGD([parameter], lr=0.1), k=2)

    def closure() -> None:
        optimizer.zero_grad()
        (parameter**2).sum().backward()  # type: ignore[no-untyped-call]

    for _ in range(5):
        optimizer.step(closure)
    assert torch.equal(parameter, torch.zeros(3))


def test_resume_between_two_second_passes_is_bit_for_bit() -> None:
    data = batches(30)
    model, other = network(), network(seed=1)
    optimizer = LookSAM(sgd(model))
    train(model, optimizer, data[:7])
    stored = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    other.load_state_dict(loaded["model"])
    resumed = LookSAM(sgd(other))
    resumed.load_state_dict(loaded["optimizer"])
    chosen = train(model, optimizer, data[7:])
    assert train(other, resumed, data[7:]) == chosen
    assert torch.equal(weights(model), weights(other))
    assert resumed.gradient_evaluations == optimizer.gradient_evaluations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be an integer >= 1, got 0"),
        ({"k": 2.0}, "k must be an integer >= 1, got 2.0"),
        ({"alpha": -0.1}, r"alpha must be a number in \[0, inf\), got -0.1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LookSAM(sgd(network()), **arguments)
