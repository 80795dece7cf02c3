"""Optimizers of many trials at once: one state for all, options that differ from trial to trial.

Every parameter has a leading trial axis, `(trials, ...)`, and every option that may differ is a tensor
`(trials,)`, so that a step of a thousand small trials is a handful of tensor operations. What a trial does is
what its own `torch.optim.SGD`, `torch.optim.AdamW` or `REG` would do, up to rounding:

    stack_key(torch.optim.SGD, {"lr": 0.1})       # options with equal keys can be one stack; None: none can
    optimizer = stack(torch.optim.SGD, model, groups, [{"lr": 0.1}, {"lr": 0.2}], parameters)
    optimizer.step(gradients)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from piste_algorithms.optimizers.reg import REG, _racs_

Options = Mapping[str, Any]
State = dict[str, Tensor]


def stack_key(optimizer: type[Optimizer], options: Options) -> Hashable | None:
    """What the optimizers of a stack have in common.

    Args:
        optimizer: their class.
        options: keyword arguments of one of them.

    Returns:
        A key that is equal for options which one stack can hold, or None where no stack can: the class has no
        stacked form, it refuses the options, or they ask for something that the stacked form does not do.
    """
    form = _FORMS.get(optimizer)
    if form is None:
        return None
    try:
        resolved = _resolved(optimizer, options)
    except (TypeError, ValueError, IndexError):
        return None
    standard = _standard(optimizer)
    if any(resolved[name] != standard[name] for name in resolved.keys() - form.varying - form.shared):
        return None
    return (optimizer, form.structure(resolved))


def stack(
    optimizer: type[Optimizer],
    model: nn.Module,
    groups: Sequence[Options],
    options: Sequence[Options],
    parameters: Mapping[str, Tensor],
) -> Stacked:
    """Makes one optimizer of many trials.

    Args:
        optimizer: the class of the trials' optimizers.
        model: one trial's model.
        groups: its parameter groups, as the class takes them; a group's own options hold for all trials.
        options: the keyword arguments of each trial; all have the same `stack_key`.
        parameters: the parameters of all trials by their names in `model`, `(trials, ...)`, updated in place.

    Raises:
        ValueError: if the options of two trials need different tensor operations, or a parameter's leading
            axis is not the trials.
    """
    form = _FORMS[optimizer]
    complete = [{**_standard(optimizer), **each} for each in options]
    structures = {form.structure(each) for each in complete}
    if len(structures) != 1:
        raise ValueError(f"options must need the same operations, got {' and '.join(map(str, structures))}")
    for name, parameter in parameters.items():
        if parameter.shape[:1] != (len(options),):
            shape = tuple(parameter.shape)
            raise ValueError(f"parameter {name} must be of shape ({len(options)}, ...), got {shape}")
    return form(model, groups, complete, parameters)


def _resolved(optimizer: Any, options: Options) -> dict[str, Any]:
    """The options with the class's defaults; the class checks them."""
    resolved: dict[str, Any] = optimizer([_PLACEHOLDER], **options).defaults
    return resolved


def _standard(optimizer: type[Optimizer]) -> dict[str, Any]:
    """The class's defaults, found once."""
    if optimizer not in _STANDARD:
        _STANDARD[optimizer] = _resolved(optimizer, {})
    return _STANDARD[optimizer]


_PLACEHOLDER = torch.empty(1, 1)
_STANDARD: dict[type[Optimizer], dict[str, Any]] = {}


class _Group(NamedTuple):
    """One parameter group.

    Attributes:
        names: its parameters.
        options: tensors `(trials,)` of those that may differ, values of the others.
        zero: the names of those that are 0 in every trial.
    """

    names: list[str]
    options: dict[str, Any]
    zero: frozenset[str]


class Stacked(ABC):
    """A stacked optimizer; `stack` makes it.

    A subclass names the options that may differ from trial to trial (`varying`) and those that may be set but
    are equal in a stack (`shared`), and updates one parameter.
    """

    varying: ClassVar[frozenset[str]]
    shared: ClassVar[frozenset[str]]

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Options],
        options: Sequence[Options],
        parameters: Mapping[str, Tensor],
    ) -> None:
        self._parameters = parameters
        self._state: dict[str, State] = {name: {} for name in parameters}
        self._step = 0
        device = next(iter(parameters.values())).device
        columns = {
            name: torch.tensor([each[name] for each in options], dtype=torch.float64, device=device)
            for name in self.varying
            if options[0][name] is not None
        }
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._groups = []
        for group in groups:
            own = dict(group)
            members = [names[id(parameter)] for parameter in own.pop("params")]
            for name in own.keys() & columns.keys():
                own[name] = columns[name].new_tensor(own[name]).expand_as(columns[name])
            resolved = {**options[0], **columns, **own}
            zero = frozenset(name for name in columns if not bool(resolved[name].any()))
            self._groups.append(_Group(members, resolved, zero))
        self._lrs = [group.options["lr"] for group in self._groups]

    def scale_lr(self, factor: float) -> None:
        """The next steps take `factor` times the learning rates that the trials were made with."""
        for group, lr in zip(self._groups, self._lrs, strict=True):
            group.options["lr"] = factor * lr

    @classmethod
    @abstractmethod
    def structure(cls, options: Options) -> Hashable:
        """The part of the options that decides which tensor operations a step has."""

    @abstractmethod
    def _update(self, parameter: Tensor, gradient: Tensor, state: State, group: _Group) -> None:
        """Updates one parameter and its state in place; all are `(trials, ...)`."""

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Performs one step of every trial.

        Args:
            gradients: by the parameters' names, in their shapes.
        """
        self._step += 1
        for group in self._groups:
            for name in group.names:
                self._update(self._parameters[name], gradients[name], self._state[name], group)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Values `(trials,)` in the dtype of a tensor `(trials, ...)`, shaped to be broadcast over it."""
    return values.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


class StackedSGD(Stacked):
    """`torch.optim.SGD` with `momentum`, `dampening`, `nesterov` and `weight_decay`.

    Trials with momentum and trials without do not share a stack.
    """

    varying = frozenset({"lr", "momentum", "dampening", "weight_decay"})
    shared = frozenset({"nesterov"})

    @classmethod
    def structure(cls, options: Options) -> Hashable:
        """Whether there is a momentum, and whether it looks ahead."""
        return (options["momentum"] != 0, options["nesterov"])

    def _update(self, parameter: Tensor, gradient: Tensor, state: State, group: _Group) -> None:
        options = group.options
        # g <- g + weight_decay theta
        if "weight_decay" not in group.zero:
            gradient = torch.addcmul(gradient, _column(options["weight_decay"], parameter), parameter)
        if "momentum" not in group.zero:
            momentum = _column(options["momentum"], parameter)
            if not state:
                # b <- g
                state["momentum_buffer"] = gradient.clone()
            else:
                # b <- mu b + (1 - dampening) g
                weight = _column(1 - options["dampening"], parameter)
                state["momentum_buffer"].mul_(momentum).addcmul_(weight, gradient)
            buffer = state["momentum_buffer"]
            # g <- g + mu b, or g <- b
            gradient = torch.addcmul(gradient, momentum, buffer) if options["nesterov"] else buffer
        # theta <- theta - lr g
        parameter.addcmul_(_column(-options["lr"], parameter), gradient)


class StackedAdamW(Stacked):
    """`torch.optim.AdamW` with `betas`, `eps` and `weight_decay`."""

    varying = frozenset({"lr", "betas", "eps", "weight_decay"})
    shared = frozenset()

    @classmethod
    def structure(cls, options: Options) -> Hashable:
        """Nothing: any two can share a stack."""
        return ()

    def _update(self, parameter: Tensor, gradient: Tensor, state: State, group: _Group) -> None:
        self._adamw(parameter, gradient, state, group, group.options["betas"])

    def _adamw(self, parameter: Tensor, gradient: Tensor, state: State, group: _Group, betas: Tensor) -> None:
        if not state:
            state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        average, squares = state["exp_avg"], state["exp_avg_sq"]
        lr, eps = group.options["lr"], group.options["eps"]
        beta1, beta2 = betas.unbind(-1)
        # theta <- (1 - lr weight_decay) theta
        if "weight_decay" not in group.zero:
            parameter.mul_(_column(1 - lr * group.options["weight_decay"], parameter))
        # m <- beta1 m + (1 - beta1) g
        average.lerp_(gradient, _column(1 - beta1, parameter))
        # v <- beta2 v + (1 - beta2) g^2
        squares.mul_(_column(beta2, parameter)).addcmul_(_column(1 - beta2, parameter) * gradient, gradient)
        # theta <- theta - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
        correction = (1 - beta2**self._step).sqrt()
        divisor = squares.sqrt().div_(_column(correction, parameter)).add_(_column(eps, parameter))
        step_size = -lr / (1 - beta1**self._step)
        parameter.addcdiv_(_column(step_size, parameter) * average, divisor)


class StackedREG(StackedAdamW):
    """`REG`: its own rule in groups with `use_reg=True`, AdamW's in the others."""

    varying = frozenset({"lr", "momentum", "weight_decay", "rms", "eps", "adamw_betas"})
    shared = frozenset({"nesterov", "n_sweeps", "order", "p"})

    @classmethod
    def structure(cls, options: Options) -> Hashable:
        """What scales every matrix alike."""
        return (options["rms"] is None, *(options[name] for name in sorted(cls.shared)))

    def _update(self, parameter: Tensor, gradient: Tensor, state: State, group: _Group) -> None:
        options = group.options
        if not options["use_reg"]:
            self._adamw(parameter, gradient, state, group, options["adamw_betas"])
            return
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average, lr = state["momentum_buffer"], options["lr"]
        momentum = _column(options["momentum"], parameter)
        # M <- mu M + (1 - mu) G
        average.lerp_(gradient, _column(1 - options["momentum"], parameter))
        # U <- (1 - mu) G + mu M, or U <- M
        update = torch.lerp(gradient, average, momentum) if options["nesterov"] else average.clone()
        # U <- -lr RACS(U)
        matrices = update.contiguous().view(*parameter.shape[:2], -1)
        rms = None if options["rms"] is None else options["rms"].to(parameter.dtype)
        bounds, factors = (_column(values, matrices[:, 0]) for values in (options["eps"], -lr))
        scaling: tuple[Any, ...] = (options["order"], options["p"], rms, bounds, factors)
        _racs_(matrices, torch.empty_like(matrices), options["n_sweeps"], *scaling)
        # W <- (1 - lr weight_decay) W + U
        kept = _column(1 - lr * options["weight_decay"], parameter)
        parameter.mul_(kept).add_(matrices.view_as(parameter))


_FORMS: dict[type[Optimizer], type[Stacked]] = {
    torch.optim.SGD: StackedSGD,
    torch.optim.AdamW: StackedAdamW,
    REG: StackedREG,
}
