"""Sharpness against explicit Hessians."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from piste_algorithms.dynamics import sharpness

double = torch.float64


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def bowl(eigenvalues: list[float], seed: int = 0) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """`1/2 x^T A x + b^T x` with the eigenvalues of A in a random basis, its argument in two tensors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=double))
    matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=double)) @ basis.T
    linear = torch.randn(n, generator=generator, dtype=double)
    start = torch.randn(n, generator=generator, dtype=double)
    parts = [start[:2].reshape(2, 1).requires_grad_(), start[2:].clone().requires_grad_()]

    def loss() -> Tensor:
        x = torch.cat([part.flatten() for part in parts])
        value: Tensor = 0.5 * x @ matrix @ x + linear @ x
        return value

    return loss, parts


@pytest.mark.parametrize(
    ("eigenvalues", "largest"),
    [
        ([1.0, 2.0, 3.0, 7.0], 7.0),
        ([-1.0, 0.0, 0.5, 4.0], 4.0),
        ([-9.0, -1.0, 2.0, 4.0], 4.0),  # the one of the largest magnitude is not the largest
        ([-9.0, -5.0, -4.0, -2.0], -2.0),
        ([-3.0, 3.0, 1.0, 0.0], 3.0),
        ([0.0, 0.0, 0.0, 0.0], 0.0),
    ],
)
def test_the_largest_eigenvalue_of_a_quadratic(eigenvalues: list[float], largest: float) -> None:
    loss, parts = bowl(eigenvalues)
    found = sharpness(loss, parts, iterations=500, tolerance=1e-12)
    assert found == pytest.approx(largest, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_the_largest_eigenvalue_of_a_networks_hessian(activation: type[nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), activation(), nn.Linear(7, 3)).to(double)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
    inputs = torch.randn(20, 5, generator=generator, dtype=double)
    labels = torch.randint(3, (20,), generator=generator)

    def loss_of(vector: Tensor) -> Tensor:
        sizes = [parameter.numel() for parameter in network.parameters()]
        ends = [0, *np.cumsum(sizes).tolist()]
        named = {
            name: vector[first:last].view_as(parameter)
            for (name, parameter), (first, last) in zip(
                network.named_parameters(), pairwise(ends), strict=True
            )
        }
        outputs = functional_call(network, named, (inputs,))
        return nn.functional.cross_entropy(outputs, labels)

    flat = nn.utils.parameters_to_vector(network.parameters()).detach()
    matrix = hessian(loss_of, flat)  # type: ignore[no-untyped-call]
    explicit = np.linalg.eigvalsh(matrix.numpy())[-1]
    found = sharpness(
        lambda: nn.functional.cross_entropy(network(inputs), labels),
        network.parameters(),
        iterations=2000,
        tolerance=1e-10,
    )
    assert found == pytest.approx(explicit, rel=1e-5)
    few = sharpness(lambda: nn.functional.cross_entropy(network(inputs), labels), network.parameters())
    assert few == pytest.approx(explicit, rel=0.05)


def test_nothing_is_left_behind() -> None:
    loss, parts = bowl([1.0, 2.0, 3.0])
    before = [part.detach().clone() for part in parts]
    state = torch.get_rng_state()
    with torch.no_grad():
        first = sharpness(loss, parts)
    assert first == sharpness(loss, parts)
    assert all(part.grad is None for part in parts)
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_generator_draws_the_first_direction() -> None:
    loss, parts = bowl([1.0, 1.5, 2.0])
    found = {
        sharpness(loss, parts, iterations=1, generator=torch.Generator().manual_seed(seed))
        for seed in range(5)
    }
    assert len(found) == 5
    assert all(1.0 <= value <= 2.0 for value in found)  # Rayleigh quotients


def test_a_linear_loss_and_one_that_is_no_number() -> None:
    x = torch.ones(3, dtype=double, requires_grad=True)
    unused = torch.ones(2, dtype=double, requires_grad=True)
    assert sharpness(lambda: x.sum(), [x]) == 0.0
    assert sharpness(lambda: x.square().sum(), [x, unused]) == pytest.approx(2.0)
    assert math.isnan(sharpness(lambda: (x * math.nan).square().sum(), [x]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": []}, "params must be tensors that require a gradient, and at least one"),
        ({"params": [torch.ones(2)]}, "params must be tensors that require a gradient"),
        ({"loss": lambda: torch.ones(())}, "loss must return a scalar that depends on params"),
        ({"loss": lambda: torch.ones(2, requires_grad=True)}, "loss must return a scalar"),
        ({"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
        ({"tolerance": -1.0}, r"tolerance must be a number in \[0, 1\), got -1.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    loss, parts = bowl([1.0, 2.0, 3.0])
    given: dict[str, object] = {"loss": loss, "params": parts, **arguments}
    with pytest.raises(ValueError, match=message):
        sharpness(**given)  # type: ignore[arg-type]
