"""SAM next to `pytorch_optimizer.SAM`, as released and with its float32 norm of the gradient in float64."""

from typing import Any
from unittest import mock

import pytorch_optimizer.optimizer.sam as peer
import torch
from pytorch_optimizer.optimizer.utils.gradient import get_global_gradient_norm
from tests.algorithms.sharpness import batches, closure_of, network, weights
from torch import Tensor
from torch.optim import Optimizer

from piste_algorithms.optimizers import SAM


def _float64_norm(
    groups: list[dict[str, Any]], device: Any = None, *, weight_adaptive: bool = False
) -> Tensor:
    """What the peer's `get_global_gradient_norm` returns, without its rounding to float32."""
    total = torch.zeros(1, dtype=torch.float64)
    for group in groups:
        for parameter in group["params"]:
            scale = parameter.abs() if weight_adaptive and group["adaptive"] else 1.0
            total += (scale * parameter.grad).square().sum()
    return total


def difference_from_peer(base: type[Optimizer], adaptive: bool, *, exact_norm: bool, **options: Any) -> float:
    """The largest difference from `pytorch_optimizer.SAM` in 50 steps that move some weight by 0.5 or more.

    Args:
        base: the optimizer that both wrap, in float64.
        adaptive: whether the ascent is ASAM's.
        exact_norm: replace the peer's norm of the gradient, which is float32, by one in float64.
        options: for `base`.
    """
    model, other = network(), network()
    build: Any = base
    ours = SAM(build(model.parameters(), **options), rho=0.1, adaptive=adaptive)
    theirs: Any = peer.SAM(other.parameters(), base, rho=0.1, adaptive=adaptive, **options)
    norm = _float64_norm if exact_norm else get_global_gradient_norm
    largest = 0.0
    with mock.patch.object(peer, "get_global_gradient_norm", norm):
        for batch in batches(50):
            ours.step(closure_of(ours, model, batch))
            closure = closure_of(theirs, other, batch)
            closure()
            theirs.step(closure)
            largest = max(largest, float((weights(model) - weights(other)).abs().max()))
    moved = float((weights(model) - weights(network())).abs().max())
    if moved < 0.5:
        raise AssertionError(f"50 steps moved no weight by more than {moved:g}")
    return largest
