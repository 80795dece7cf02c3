"""Problems with known minima, each with a budget of steps and a tolerance: the battery's catalogue.

A problem's model is an `nn.Module`, so that an optimizer's `default_param_groups` can sort its parameters.
Losses are deterministic. Parameters are of order one, so that one learning rate of an optimizer serves them
all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Tensors(nn.Module):
    """Parameters by name."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))


@dataclass(frozen=True)
class Problem:
    """A loss with a known minimum: within `steps` the loss comes within `tolerance` of `minimum`."""

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    minimum: float
    steps: int
    tolerance: float
    matrices_only: bool = True


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _tensor(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(name)


def ill_conditioned_quadratic() -> Problem:
    """A separable quadratic with curvatures from 1 to 1e-3; minimum 0."""
    curvatures = torch.logspace(0, -3, 32, dtype=torch.float64).view(4, 8)
    target = _normal(4, 8, seed=0)
    return Problem(
        "ill-conditioned quadratic",
        lambda: Tensors(weight=torch.zeros(4, 8, dtype=torch.float64)),
        lambda model: 0.5 * (curvatures * (_tensor(model, "weight") - target) ** 2).sum(),
        minimum=0.0,
        steps=1000,
        tolerance=2e-3,
    )


def rosenbrock() -> Problem:
    """Four points on the two-dimensional Rosenbrock function, started apart; minimum 0 at (1, 1)."""
    starts = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [1.5, -0.5], [-0.5, 1.5]], dtype=torch.float64)

    def loss(model: nn.Module) -> Tensor:
        x, y = _tensor(model, "weight").unbind(dim=1)
        return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).sum()

    return Problem(
        "Rosenbrock", lambda: Tensors(weight=starts), loss, minimum=0.0, steps=2500, tolerance=2e-2
    )


def matrix_least_squares() -> Problem:
    """Mean squared error of a linear map with noise; minimum by the normal equations."""
    inputs, noise = _normal(64, 8, seed=1), _normal(64, 5, seed=2)
    outputs = inputs @ _normal(8, 5, seed=3) + 0.1 * noise
    solution = torch.linalg.lstsq(inputs, outputs).solution
    return Problem(
        "matrix least squares",
        lambda: Tensors(weight=torch.zeros(8, 5, dtype=torch.float64)),
        lambda model: ((inputs @ _tensor(model, "weight") - outputs) ** 2).mean(),
        minimum=((inputs @ solution - outputs) ** 2).mean().item(),
        steps=1000,
        tolerance=1e-3,
    )


def logistic_regression() -> Problem:
    """Regularised logistic regression; minimum by Newton's method."""
    inputs = _normal(128, 6, seed=4)
    labels = (inputs @ _normal(6, seed=5) + _normal(128, seed=6) > 0).double()

    def objective(weight: Tensor) -> Tensor:
        logits = inputs @ weight.flatten()
        likelihood = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return likelihood + 0.005 * (weight**2).sum()

    solution = torch.zeros(6, dtype=torch.float64)
    for _ in range(20):
        probability = torch.sigmoid(inputs @ solution)
        gradient = inputs.T @ (probability - labels) / 128 + 0.01 * solution
        curvature = (inputs.T * probability * (1 - probability)) @ inputs / 128
        solution = solution - torch.linalg.solve(curvature + 0.01 * torch.eye(6).double(), gradient)
    return Problem(
        "logistic regression",
        lambda: Tensors(weight=torch.zeros(1, 6, dtype=torch.float64)),
        lambda model: objective(_tensor(model, "weight")),
        minimum=objective(solution).item(),
        steps=1000,
        tolerance=1e-3,
    )


def mixed_tree() -> Problem:
    """A linear map with bias, and a scalar: two, one and no dimensions; minimum by least squares."""
    inputs = _normal(64, 5, seed=7)
    outputs = inputs @ _normal(5, 3, seed=8) + _normal(3, seed=9) + 0.1 * _normal(64, 3, seed=10)
    design = torch.cat([inputs, torch.ones(64, 1, dtype=torch.float64)], dim=1)
    residual = design @ torch.linalg.lstsq(design, outputs).solution - outputs

    def loss(model: nn.Module) -> Tensor:
        predicted = inputs @ _tensor(model, "weight") + _tensor(model, "bias")
        return ((predicted - outputs) ** 2).mean() + (_tensor(model, "scale") - 1.5) ** 2

    def model() -> nn.Module:
        return Tensors(weight=_normal(5, 3, seed=11), bias=_normal(3, seed=12), scale=_normal(seed=13))

    return Problem(
        "mixed tree",
        model,
        loss,
        (residual**2).mean().item(),
        steps=1000,
        tolerance=1e-3,
        matrices_only=False,
    )


PROBLEMS = (
    ill_conditioned_quadratic(),
    rosenbrock(),
    matrix_least_squares(),
    logistic_regression(),
    mixed_tree(),
)
