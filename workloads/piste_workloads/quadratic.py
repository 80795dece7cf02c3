"""A quadratic bowl with a known minimum: the smallest workload, for checks of optimizers and platform.

    f(x) = 1/2 x^T A x - b^T x,    A = Q diag(lambda_1 .. lambda_n) Q^T,    grad f(x) = A x - b

with `Q` a random rotation, `lambda` spaced geometrically from `1 / condition` to 1, and `b = A x*` for a
random `x*`. Closed forms:

- the minimum is at `x* = A^-1 b`, with `f(x*) = -1/2 b^T x*`, so the excess is
  `f(x) - f(x*) = 1/2 (x - x*)^T A (x - x*)`, which is what `train/loss` records, computed in this form;
- plain gradient descent contracts the part of `x - x*` along eigenvector i by `1 - lr lambda_i` a step, so
  `||x - x*||` by at most `max_i |1 - lr lambda_i|`; the best `lr` is `2 / (lambda_1 + lambda_n)`, with the
  factor `(condition - 1) / (condition + 1)`.

Source of both: Nesterov, "Introductory lectures on convex optimization" (2004), section 2.1.5.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from piste.building import build_optimizer
from piste.config import Optimizer, Recipe, Section
from piste.workload import Run


class Problem(Section):
    """`[problem]`: the bowl."""

    dimension: int = Field(default=16, ge=1)
    condition: float = Field(
        default=10.0, ge=1.0, description="largest / smallest eigenvalue; the largest is 1"
    )
    steps: int = Field(default=100, ge=1)


class Config(Recipe, frozen=True):
    """Everything that a run of the workload `quadratic` is told."""

    workload: str = "quadratic"
    optimizer: Optimizer = Optimizer.model_validate({"name": "sgd", "lr": 1.0})
    problem: Problem = Problem()


headline = ("train/loss",)

# For the contract battery: six steps, a checkpoint every two.
test_settings = {"problem.dimension": 4, "problem.steps": 6, "checkpoints.every": 2}


class Quadratic(nn.Module):
    """The bowl; its one parameter `x` starts at zero.

    Args:
        problem: The recipe's `[problem]`.
        generator: Draws the rotation and the minimum.
    """

    matrix: Tensor
    minimum: Tensor

    def __init__(self, problem: Problem, generator: torch.Generator) -> None:
        super().__init__()
        n, double = problem.dimension, torch.float64
        rotation, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=double))
        # lambda_i = condition^-(1 - i / (n - 1)), i = 0 .. n - 1
        self.eigenvalues = problem.condition ** (torch.linspace(0.0, 1.0, n, dtype=double) - 1.0)
        self.register_buffer("matrix", rotation @ torch.diag(self.eigenvalues) @ rotation.T)
        self.register_buffer("minimum", torch.randn(n, generator=generator, dtype=double))
        self.x = nn.Parameter(torch.zeros(n, dtype=double))

    def forward(self) -> Tensor:
        """The excess over the minimum, `1/2 (x - x*)^T A (x - x*)`, a scalar."""
        offset = self.x - self.minimum
        return 0.5 * offset @ self.matrix @ offset


def train(config: Config, run: Run) -> None:
    """Minimises; logs `train/loss`, the excess before each step and, one step past the last, at the end."""
    model = Quadratic(config.problem, torch.Generator().manual_seed(run.seed))
    optimizer = build_optimizer(config.optimizer, model)
    network = run.prepare(model)
    start = run.resume(model, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = network()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    steps = config.problem.steps
    for step in range(start + 1, steps + 1):
        loss = optimizer.step(closure)  # type: ignore[arg-type]
        run.log({"train/loss": float(loss)}, step)
        stop = run.mean(float(run.should_stop)) > 0.0
        if stop or config.checkpoints.due(step, steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            run.report({}, step, checkpoint=state)
        if stop:
            return
    with torch.no_grad():
        run.log({"train/loss": float(model())}, steps + 1)
