"""Sharpness: the largest eigenvalue of a loss's Hessian, by power iteration on Hessian-vector products.

With the gradient g and the Hessian H at the parameters, and Pearlmutter's product (Neural Comput. 6, 1994)

    H v = d (g^T v) / d theta

power iteration finds the eigenvalue of the largest magnitude,

    v <- H v / ||H v||,    lambda = v^T H v

Where that is negative, H - lambda I has no negative eigenvalue, and the same iteration on it finds the
largest eigenvalue of H, shifted by lambda.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from piste_algorithms.optimizers._checks import check_range

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
        iterations: at most as many products for either end of the spectrum.
        tolerance: the iteration ends when the eigenvalue changes by less than this, relatively.
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
    extreme = _dominant(product, start, iterations, tolerance)
    if not extreme < 0.0:
        return extreme
    # H - lambda I
    shifted = _dominant(
        lambda v: [hv - extreme * each for hv, each in zip(product(v), v, strict=True)],
        start,
        iterations,
        tolerance,
    )
    return extreme + shifted


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


def _dominant(product: Product, vector: Vector, iterations: int, tolerance: float) -> float:
    """The eigenvalue of the largest magnitude, from a direction of length 1."""
    eigenvalue = math.inf
    for _ in range(iterations):
        image = product(vector)
        # lambda = v^T H v
        before, eigenvalue = eigenvalue, _dot(vector, image)
        length = math.sqrt(_dot(image, image))
        if length == 0.0 or not math.isfinite(length):
            return eigenvalue
        if abs(eigenvalue - before) <= tolerance * abs(eigenvalue):
            return eigenvalue
        # v <- H v / ||H v||
        vector = [each / length for each in image]
    return eigenvalue


def _dot(a: Vector, b: Vector) -> float:
    return float(torch.stack([(x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]).sum())
