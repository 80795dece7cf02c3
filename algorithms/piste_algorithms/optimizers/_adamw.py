"""Optimizers that have a rule of their own for matrices and torch's AdamW for the rest."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from piste_algorithms._checks import check_betas, check_range


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


class WithAdamW(Optimizer):
    """A rule for matrices in groups whose flag is true, AdamW in those whose flag is false.

    A subclass names the group option that is the flag, the one that is AdamW's eps, and what it takes for a
    matrix; it checks and applies its own rule. A matrix has one momentum buffer as its state.
    """

    flag: ClassVar[str]
    adamw_eps: ClassVar[str]
    takes: ClassVar[str]

    @abstractmethod
    def _is_matrix(self, parameter: Tensor) -> bool:
        """Whether the rule for matrices takes a parameter."""

    @abstractmethod
    def _check_rule(self, group: Mapping[str, Any]) -> None:
        """Raise `ValueError` where an option of the rule for matrices is outside its range."""

    @abstractmethod
    def _update_matrices(
        self,
        group: Mapping[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        buffers: list[Tensor],
    ) -> None:
        """Update the matrices of a group that have gradients, and their momentum buffers."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`; it is checked first."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check(self, group: Mapping[str, Any]) -> None:
        check_range("lr", group["lr"], low=0.0)
        check_range("weight_decay", group["weight_decay"], low=0.0)
        if group[self.flag]:
            check_range("momentum", group["momentum"], low=0.0, high=1.0)
            self._check_rule(group)
            self._check_matrices(group)
        else:
            check_betas("adamw_betas", group["adamw_betas"])
            check_range(self.adamw_eps, group[self.adamw_eps], low=0.0)

    def _check_matrices(self, group: Mapping[str, Any]) -> None:
        for index, parameter in enumerate(group["params"]):
            if self._is_matrix(parameter) and parameter.is_floating_point():
                continue
            name = group["param_names"][index] if "param_names" in group else f"number {index} of the group"
            raise ValueError(
                f"a group with {self.flag}=True takes {self.takes}, but parameter {name} is "
                f"{tuple(parameter.shape)} {parameter.dtype}; put it into a group with {self.flag}=False "
                f"({type(self).__name__}.default_param_groups(model) does)"
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step.

        Args:
            closure: re-evaluates the model with gradients enabled and returns the loss.

        Returns:
            The closure's loss, or `None` without one.

        Raises:
            RuntimeError: if a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                if not group[self.flag]:
                    adamw_step(self, group, betas=group["adamw_betas"], eps=group[self.adamw_eps])
                    continue
                parameters, gradients = gradients_of(self, group)
                for parameter in parameters:
                    if not self.state[parameter]:
                        buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                        self.state[parameter]["momentum_buffer"] = buffer
                buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                self._update_matrices(group, parameters, gradients, buffers)
        return loss
