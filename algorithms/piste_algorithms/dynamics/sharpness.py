"""Sharpness: the largest eigenvalue of a loss's Hessian, by power iteration on Hessian-vector products.

With the gradient g and the Hessian H at the parameters, and Pearlmutter's product (Neural Comput. 6, 1994)

    H v = d (g^T v) / d theta

power iteration finds an eigenvector of the eigenvalue of the largest magnitude,

    v <- H v / ||H v||,    lambda = v^T H v,    m = ||H v||

Where that is not the largest eigenvalue, because it is negative or because there is one of either sign, the
same iteration on H + m I, which has no negative eigenvalue, finds the largest one of H, shifted by m. Neither
v^T H v is above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from piste_algorithms._checks import check_range

Vector = list[Tensor]  # one tensor a parameter
Product = Callable[[Vector], Vector]


def sharpness(
    loss: Callable[[], Tensor],
    params: Iterable[Tensor],
    *,
    iterations: int = 100,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
) -> float:
    """The largest eigenvalue of the Hessian of a loss.

    Args:
        loss: takes no argument and returns a scalar that depends on `params`, the same one at every call.
        params: tensors that require a gradient.
        iterations: at most as many products with H, and as many with H + m I.
        tolerance: an iteration ends when ||H v - lambda v||^2 is at most as much of ||H v||^2.
        generator: draws the first direction, on the device of the parameters; None: one of seed 0.

    Returns:
        The eigenvalue; negative where the loss curves down in every direction. NaN or infinite where the loss
        is.

    Raises:
        ValueError: if `params` is empty or holds a tensor that requires no gradient, `loss` is no scalar or
            does not depend on them, or a number is out of its range.
    """
    parameters = list(params)
    if not parameters or not all(parameter.requires_grad for parameter in parameters):
        raise ValueError("params must be tensors that require a gradient, and at least one")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a whole number of at least 1, got {iterations!r}")
    check_range("tolerance", tolerance, low=0.0, high=1.0)

    with torch.enable_grad():
        value = loss()
        if value.numel() != 1 or not value.requires_grad:
            raise ValueError(f"loss must return a scalar that depends on params, got {value!r}")
        gradient = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)

    def product(vector: Vector) -> Vector:
        # H v = d (g^T v) / d theta
        curved = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
        if not curved:  # the loss is linear
            return [torch.zeros_like(v) for v in vector]
        outputs, weights = zip(*curved, strict=True)
        found = torch.autograd.grad(outputs, parameters, weights, retain_graph=True, materialize_grads=True)
        return [each.detach() for each in found]

    start = _direction(parameters, generator)
    found = _dominant(product, start, iterations, tolerance)
    if (found.eigenvalue >= 0.0 and found.converged) or not math.isfinite(found.length):
        return found.eigenvalue
    shift = found.length

    def shifted(vector: Vector) -> Vector:
        # H + m I
        return [hv + shift * v for hv, v in zip(product(vector), vector, strict=True)]

    return max(found.eigenvalue, _dominant(shifted, start, iterations, tolerance).eigenvalue - shift)


def _direction(parameters: Sequence[Tensor], generator: torch.Generator | None) -> Vector:
    """A random direction of length 1."""
    device = parameters[0].device
    generator = torch.Generator(device).manual_seed(0) if generator is None else generator
    drawn = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype, device=device).to(p.device)
        for p in parameters
    ]
    length = math.sqrt(_dot(drawn, drawn))
    return [each / length for each in drawn]


class _Found(NamedTuple):
    """The end of a power iteration: v^T H v, ||H v||, and whether v is nearly an eigenvector."""

    eigenvalue: float
    length: float
    converged: bool


def _dominant(product: Product, vector: Vector, iterations: int, tolerance: float) -> _Found:
    """The eigenvalue of the largest magnitude, from a direction of length 1."""
    found = _Found(0.0, 0.0, False)
    for _ in range(iterations):
        image = product(vector)
        # lambda = v^T H v, m = ||H v||
        eigenvalue, square = _dot(vector, image), _dot(image, image)
        # ||H v - lambda v||^2 = m^2 - lambda^2
        converged = square - eigenvalue**2 <= tolerance * square
        found = _Found(eigenvalue, math.sqrt(square), converged)
        if converged or not math.isfinite(square):
            break
        # v <- H v / ||H v||
        vector = [each / found.length for each in image]
    return found


def _dot(a: Vector, b: Vector) -> float:
    return float(torch.stack([(x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]).sum())
