"""What is measured between epochs: held-out parts, and the sharpness of the loss."""

from __future__ import annotations

import torch
from torch import nn

from piste.workload import Run
from piste_algorithms.dynamics import sharpness
from piste_workloads.hardware import precision
from piste_workloads.supervised.config import SupervisedRecipe
from piste_workloads.supervised.task import Task


@torch.no_grad()
def evaluate(
    config: SupervisedRecipe, run: Run, network: nn.Module, model: nn.Module, task: Task, part: str
) -> dict[str, float]:
    """A task's mean scores on the examples of a part, shared out over the workers.

    Args:
        config: The recipe.
        run: The run.
        network: The model as `run.prepare` has returned it.
        model: The model itself.
        task: The task.
        part: `valid` or `test`.

    Returns:
        `PART/SCORE` for each of the task's scores.
    """
    model.eval()
    if run.world_size > 1:  # batch norm's statistics are rank 0's, on every worker
        network(task.examples(part, torch.zeros(1, dtype=torch.int64))[0])
    mine = torch.tensor(run.shard(list(range(task.sizes[part]))))
    sums: dict[str, float] = {}
    size = config.train.evaluation_batch
    for first in range(0, len(mine), size):
        inputs, targets = task.examples(part, mine[first : first + size])
        with precision(config.train.bf16, run.device):
            outputs = model(inputs)
        for key, values in task.scores(outputs.float(), targets).items():
            sums[key] = sums.get(key, 0.0) + float(values.double().sum())
    model.train()
    count = run.mean(float(len(mine)))
    return {f"{part}/{key}": run.mean(value) / count for key, value in sums.items()}


def top_eigenvalue(config: SupervisedRecipe, model: nn.Module, task: Task) -> float:
    """The largest eigenvalue of the training loss's Hessian, on the same training examples at every call."""
    size = task.sizes["train"]
    count = min(config.train.sharpness_examples, size)
    inputs, targets = task.examples("train", torch.arange(count) * size // count)  # spread over the classes
    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    value = sharpness(
        lambda: task.loss(model(inputs).float(), targets), parameters, iterations=30, tolerance=1e-3
    )
    model.train()
    return value
