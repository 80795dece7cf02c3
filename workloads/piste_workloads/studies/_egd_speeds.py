"""What an epoch with EGD costs, and how fast it moves along singular directions, measured without runs."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from piste.building import build_optimizer
from piste.running import load_recipe
from piste_algorithms.optimizers import EGD
from piste_workloads.grokking.config import Config
from piste_workloads.grokking.networks import network
from piste_workloads.grokking.tasks import dataset, loss
from piste_workloads.grokking.train import order_of


def epoch_costs(recipes: list[str], pairs: int, seed: int = 0) -> list[float]:
    """Processor time of the first recipe's epoch over that of the second's, one a pair.

    An epoch is its steps, without evaluation. They are taken in turns on one thread, after one of each.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = (_Epochs(recipe, seed) for recipe in recipes)
        found = []
        for pair in range(pairs + 1):
            order = (first, second) if pair % 2 else (second, first)
            seconds = {side: side.take(pair + 1) for side in order}
            found.append(seconds[first] / seconds[second])
        return found[1:]
    finally:
        torch.set_num_threads(threads)


class _Epochs:
    """The epochs of a recipe, without a run."""

    def __init__(self, recipe: str, seed: int) -> None:
        config = load_recipe(recipe)
        assert isinstance(config, Config)
        self._config, self._seed = config, seed
        self._model = network(config, seed)
        self._optimizer = build_optimizer(config.optimizer, self._model)
        self._points = dataset(config, seed, torch.device("cpu")).train

    def take(self, number: int) -> float:
        """Takes an epoch's steps; returns the seconds of processor time."""
        began = time.process_time()
        for batch in order_of(self._config, self._seed, number):
            inputs, targets = self._points.inputs[batch], self._points.targets[batch]

            def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                self._optimizer.zero_grad()
                value = loss(self._config, self._model(inputs), targets)
                value.backward()  # type: ignore[no-untyped-call]
                return value.detach()

            self._optimizer.step(closure)  # type: ignore[arg-type]
        return time.process_time() - began


def steps_to_forget(
    optimizer: str, epsilons: list[float], step_size: float, size: int = 8, part: float = 0.05, seed: int = 0
) -> list[int]:
    """How many steps a linear layer needs to lose all but a part of its error in every direction.

    The loss is `1/2 tr((W - W*) Sigma (W - W*)^T)`, its gradient `(W - W*) Sigma`. `Sigma` has eigenvalues
    from 1 down to epsilon, spaced geometrically; along each of its eigenvectors the error has singular value
    1 at the start. In direction i gradient descent keeps `1 - step_size lambda_i` of it a step, EGD takes
    `step_size` off it.

    Args:
        optimizer: `sgd` or `egd`.
        epsilons: The smallest eigenvalues, one a problem.
        step_size: The learning rate.
        size: Of the layer, `(size, size)`.
        part: What may be left of the error's largest singular value.
        seed: Draws the two bases.
    """
    found = []
    for epsilon in epsilons:
        generator = torch.Generator().manual_seed(seed)
        left, right = (
            torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
            for _ in range(2)
        )
        speeds = epsilon ** torch.linspace(0.0, 1.0, size, dtype=torch.float64)
        covariance = right @ torch.diag(speeds) @ right.T
        error = nn.Parameter(left @ right.T)
        made: Any = torch.optim.SGD([error], lr=step_size)
        if optimizer == "egd":
            made = EGD(made)
        steps = 0
        while float(torch.linalg.matrix_norm(error.detach(), 2)) > part:
            error.grad = error.detach() @ covariance
            made.step()
            steps += 1
        found.append(steps)
    return found
