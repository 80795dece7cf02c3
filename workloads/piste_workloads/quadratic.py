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

from collections.abc import Hashable, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from piste.building import build_optimizer, parameter_groups
from piste.catalog import load_optimizer
from piste.config import Optimizer, Recipe, Section
from piste.packing import PackedRuns, single_optimizer
from piste.workload import Run
from piste_algorithms.stacked import stack, stack_key


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

    @property
    def total_steps(self) -> int:
        """Where a run of this configuration ends."""
        return self.problem.steps


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


def pack_key(config: Config) -> Hashable | None:
    """Trials of one dimension and as many steps are packed, with optimizers that can be stacked."""
    optimizer = single_optimizer(config.optimizer)
    rule = None if optimizer is None else stack_key(optimizer, config.optimizer.options)
    return None if rule is None else (rule, config.problem.dimension, config.problem.steps)


def train_many(configs: Sequence[Config], runs: PackedRuns) -> None:
    """`train` for all trials of a pack at once, up to rounding.

    Trials of one bowl stand side by side, so that their gradients are one product of matrices.
    """
    kinds = [(config.problem, seed) for config, seed in zip(configs, runs.seeds, strict=True)]
    bowls = {kind: Quadratic(kind[0], torch.Generator().manual_seed(kind[1])) for kind in set(kinds)}
    rows = _side_by_side(kinds)
    own = [bowls[kinds[row[0]]] for row in rows]
    matrices = torch.stack([bowl.matrix for bowl in own]).to(runs.device)  # (bowls, n, n)
    minima = torch.stack([bowl.minimum for bowl in own])[:, None].to(runs.device)  # (bowls, 1, n)

    order = [trial for row in rows for trial in row]
    place_of = {trial: place for place, trial in enumerate(order)}
    places = torch.tensor([place_of[trial] for trial in range(len(runs))], device=runs.device)
    x = minima.new_zeros(len(order), minima.shape[-1])
    section = configs[0].optimizer
    options = [configs[trial].optimizer.options for trial in order]
    groups = parameter_groups(section, own[0])
    optimizer = stack(load_optimizer(section.name), own[0], groups, options, {"x": x})

    steps = configs[0].problem.steps
    for step in range(1, steps + 2):
        offset = x.view(len(rows), -1, x.shape[-1]) - minima
        # grad f(x) = A (x - x*), f(x) - f(x*) = 1/2 (x - x*)^T A (x - x*)
        gradient = offset @ matrices
        loss = 0.5 * (offset * gradient).sum(-1)
        runs.log({"train/loss": loss.view(-1)[places]}, step)
        if step <= steps:
            optimizer.step({"x": gradient.view_as(x)})


def _side_by_side(kinds: Sequence[Hashable]) -> list[list[int]]:
    """Trials in rows of one kind and of equal length, filled up with repetitions.

    Where repetitions would be more than half of all, each trial is a row.
    """
    members: dict[Hashable, list[int]] = {}
    for trial, kind in enumerate(kinds):
        members.setdefault(kind, []).append(trial)
    length = max(map(len, members.values()))
    if length * len(members) > 2 * len(kinds):
        return [[trial] for trial in range(len(kinds))]
    return [row + row[-1:] * (length - len(row)) for row in members.values()]
