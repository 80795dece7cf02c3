"""Grokfast: the slow part of the gradients, their moving average, is amplified; a baseline for grokking.

For a parameter with gradient `g`::

    h <- alpha h + (1 - alpha) g              (h = g at the first step)
    g <- g + lamb h

and the result goes to any other optimizer, in place of the gradient.

Source: Jaerin Lee, Bong Gyun Kang, Kihoon Kim and Kyoung Mu Lee, "Grokfast: Accelerated Grokking by
Amplifying Slow Gradients" (2024), arXiv:2405.20233, the filter with an exponential moving average. The start
of `h` is that of the released `gradfilter_ema`: the first gradient.
"""

from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from piste_algorithms._checks import check_range
from piste_algorithms.optimizers._wrapping import Wrapper


def amplify_slow(
    gradients: list[Tensor], averages: list[Tensor], alpha: float, lamb: float
) -> tuple[Tensor, ...]:
    """Update moving averages of gradients, in place, and add them to the gradients.

    Args:
        gradients: the gradients.
        averages: their moving averages, of the same shapes.
        alpha: share of the old average in the new one.
        lamb: weight with which the averages are added.

    Returns:
        The amplified gradients; `gradients` stay as they are.
    """
    if not gradients:
        return ()
    # h <- alpha h + (1 - alpha) g
    torch._foreach_lerp_(averages, gradients, 1 - alpha)
    # g <- g + lamb h
    return torch._foreach_add(gradients, averages, alpha=lamb)


class GrokfastEMA(Wrapper):
    """Amplifies the slow part of the gradients and hands them to another optimizer, the base.

    The base's weight decay is the base's own: it is not part of the gradient that is filtered. Gradients are
    the caller's again after a step. The state is one average a parameter, in the parameter's dtype.

    Args:
        base: a built optimizer, which takes the step.
        alpha: share of the old average in the new one, 0 <= alpha < 1.
        lamb: weight with which the average is added to the gradient, at least 0.

    Raises:
        ValueError: if an argument is outside its range.
    """

    needs_closure: ClassVar[bool] = False
    matrices_only: ClassVar[bool] = False
    # The published setting for digits: with the defaults Rosenbrock's valley is overshot for good.
    test_settings: ClassVar[dict[str, Any]] = {
        "base": {"name": "adamw", "lr": 0.2, "weight_decay": 0.0},
        "alpha": 0.8,
        "lamb": 0.1,
    }
    test_schedule: ClassVar[str] = "linear"

    def __init__(self, base: Optimizer, alpha: float = 0.98, lamb: float = 2.0) -> None:
        check_range("alpha", alpha, low=0.0, high=1.0)
        check_range("lamb", lamb, low=0.0)
        super().__init__(base)
        self.alpha = alpha
        self.lamb = lamb

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
        with torch.no_grad(), self._gradients_kept() as parameters:
            gradients = []
            for parameter in parameters:
                assert parameter.grad is not None
                gradients.append(parameter.grad)
                if not self.state[parameter]:
                    self.state[parameter]["average"] = parameter.grad.clone()
            averages = [self.state[parameter]["average"] for parameter in parameters]
            amplified = amplify_slow(gradients, averages, self.alpha, self.lamb)
            for parameter, gradient in zip(parameters, amplified, strict=True):
                parameter.grad = gradient
            self.base.step()
        return loss
