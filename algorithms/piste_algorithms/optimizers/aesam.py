"""AE-SAM: SAM's second gradient on those steps alone where the gradient is large for this stage of training.

The squared norm of the stochastic gradient `g` stands for sharpness; its mean and variance are followed by
moving averages, and the threshold falls in training, so that SAM becomes more frequent (`t` of `T` steps are
done)::

    mu <- delta mu + (1 - delta) ||g||^2
    sigma^2 <- delta sigma^2 + (1 - delta) (||g||^2 - mu)^2
    c = (t / T) lambda_1 + (1 - t / T) lambda_2
    SAM's step where ||g||^2 >= mu + c sigma, the base's step with g otherwise

For normally distributed `||g||^2` and lambda_1 = -lambda_2, SAM takes about half of all steps.

The averages start with the first gradient: `mu = ||g||^2`, `sigma = 0`; the paper leaves the start open. The
decision hangs on `||g||` alone, so ranks with averaged gradients decide alike. `sam.py` says what the closure
does.

Source: Jiang, Yang, Zhang, Kwok, "An Adaptive Policy to Employ Sharpness-Aware Minimization" (2023,
arXiv:2304.14647).
"""

import math
from typing import Any, ClassVar

from torch import nn
from torch.optim.optimizer import Optimizer

from piste_algorithms._checks import check_integer, check_range
from piste_algorithms.optimizers._ascent import SharpnessAware


def updated_averages(mean: float, variance: float, square: float, delta: float) -> tuple[float, float]:
    """The moving averages `mu` and `sigma^2` after one more `||g||^2`."""
    # mu <- delta mu + (1 - delta) ||g||^2
    mean = delta * mean + (1 - delta) * square
    # sigma^2 <- delta sigma^2 + (1 - delta) (||g||^2 - mu)^2
    deviation = square - mean
    return mean, delta * variance + (1 - delta) * deviation * deviation


class AESAM(SharpnessAware):
    """AE-SAM around any optimizer; otherwise as `SAM`.

    A gradient that is not finite does not enter the averages.

    Args:
        base: a built optimizer, which takes the steps; its groups are this one's.
        rho: radius of the ascent, positive.
        total_steps: T, the steps of the training, at least 1; the threshold stays where it is after them.
        delta: decay of the moving averages, in [0, 1).
        lambda_1: the threshold at the end, in standard deviations.
        lambda_2: the threshold at the start, in standard deviations.
        adaptive: whether each entry of the ascent is scaled by the square of its weight.
        model: the model; its normalisation layers keep the running statistics of the first pass alone.

    Raises:
        ValueError: if an argument is outside its range.
    """

    test_settings: ClassVar[dict[str, Any]] = {
        "base": {"name": "adamw", "lr": 0.2, "weight_decay": 0.0},
        "rho": 0.01,
        "total_steps": 1000,
    }
    test_schedule: ClassVar[str] = "linear"
    memory: ClassVar[tuple[str, ...]] = (*SharpnessAware.memory, "mean", "variance")

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        *,
        total_steps: int,
        delta: float = 0.9,
        lambda_1: float = -1.0,
        lambda_2: float = 1.0,
        adaptive: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        check_integer("total_steps", total_steps, low=1)
        check_range("delta", delta, low=0.0, high=1.0)
        check_range("lambda_1", lambda_1, low=-math.inf, low_open=True)
        check_range("lambda_2", lambda_2, low=-math.inf, low_open=True)
        super().__init__(base, rho, adaptive, model)
        self.total_steps = total_steps
        self.delta = delta
        self.lambda_1 = lambda_1
        self.lambda_2 = lambda_2
        self.mean: float | None = None
        self.variance = 0.0

    def _chooses_second_pass(self, norm: float) -> bool:
        square = norm * norm
        if not math.isfinite(square):
            return False
        if self.mean is None:
            self.mean = square
        else:
            self.mean, self.variance = updated_averages(self.mean, self.variance, square, self.delta)
        # c = (t / T) lambda_1 + (1 - t / T) lambda_2
        done = min(1.0, self.steps / self.total_steps)
        threshold = done * self.lambda_1 + (1 - done) * self.lambda_2
        return square >= self.mean + threshold * math.sqrt(self.variance)
