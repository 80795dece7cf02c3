"""The AdamW half of optimizers that have another rule for matrices: torch's own function on one group."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer


def gradients_of(optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The group's parameters that have a gradient, and those gradients.

    Raises:
        RuntimeError: if a gradient is sparse.
    """
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient.is_sparse:
            raise RuntimeError(
                f"{type(optimizer).__name__} does not support sparse gradients, but a parameter of shape "
                f"{tuple(parameter.shape)} has one (for an embedding, set sparse=False)"
            )
    return parameters, gradients


def adamw_step(
    optimizer: Optimizer, group: Mapping[str, Any], *, betas: tuple[float, float], eps: float
) -> None:
    """Update one group as `torch.optim.AdamW(betas=betas, eps=eps)` does, bit for bit.

    The state is AdamW's: `step`, `exp_avg` and `exp_avg_sq` of each parameter. `lr` and `weight_decay` are
    the group's.

    Args:
        optimizer: the owner of the state.
        group: one of its parameter groups.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.

    Raises:
        RuntimeError: if a gradient is sparse.
    """
    parameters, gradients = gradients_of(optimizer, group)
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    states = [optimizer.state[parameter] for parameter in parameters]
    adamw(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        has_complex=any(parameter.is_complex() for parameter in parameters),
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=eps,
        maximize=False,
    )
