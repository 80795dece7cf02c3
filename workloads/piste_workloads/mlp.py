"""A small multilayer perceptron that learns from another one: for studies of optimizers over many trials.

The teacher is a network of one hidden layer, drawn at random; its points are

    y = v^T tanh(W x + b) + noise epsilon,    W_ij ~ N(0, 1 / inputs),    v_i, b_i, x_j, epsilon ~ N(0, 1)

so no student's `valid/loss`, the mean squared error on points that it has not seen, is below `noise^2` but
by chance. Teacher and data come from `[data] seed` alone: trials with different seeds differ in the student's
first weights and in the order of the data, as repeats of an experiment do.

The student is `inputs - hidden ... - 1` with first weights from U(-1, 1) / sqrt(inputs of the layer).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn.functional import mse_loss

from piste.building import build_optimizer, parameter_groups
from piste.catalog import load_optimizer
from piste.config import Optimizer, Recipe, Section
from piste.packing import PackedRuns, single_optimizer
from piste.workload import Run
from piste_algorithms.stacked import stack, stack_key

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Model(Section):
    """`[model]`: the student."""

    hidden: tuple[int, ...] = Field(default=(16,), min_length=1, description="widths of the hidden layers")
    activation: Literal["gelu", "relu", "silu", "tanh"] = "tanh"


class Data(Section):
    """`[data]`: the teacher and its points."""

    inputs: int = Field(default=8, ge=1)
    teacher: int = Field(default=4, ge=1, description="width of the teacher's hidden layer")
    samples: int = Field(default=256, ge=1, description="points to learn from, and as many to validate on")
    noise: float = Field(default=0.1, ge=0.0, description="standard deviation of the targets' noise")
    seed: int = Field(default=0, ge=0)


class Train(Section):
    """`[train]`."""

    steps: int = Field(default=100, ge=1)
    batch: int = Field(default=32, ge=1, description="points of a step, over all workers")
    validate_every: int = Field(default=0, ge=0, description="steps between validations; 0: at the end alone")
    dtype: Literal["float32", "float64"] = "float32"


class Config(Recipe, frozen=True):
    """Everything that a run of the workload `mlp` is told."""

    workload: str = "mlp"
    optimizer: Optimizer = Optimizer.model_validate({"name": "adamw", "lr": 1e-2})
    model: Model = Model()
    data: Data = Data()
    train: Train = Train()

    @property
    def total_steps(self) -> int:
        """Where a run of this configuration ends."""
        return self.train.steps

    @model_validator(mode="after")
    def _equal_shares(self) -> Self:
        if self.train.batch % self.resources.workers:
            raise ValueError(
                f"train.batch = {self.train.batch} cannot be shared by resources.workers = "
                f"{self.resources.workers}: use a multiple of it"
            )
        return self


Points = tuple[Tensor, Tensor]

headline = ("valid/loss", "train/loss")

# For the contract battery: six steps, a checkpoint every two.
test_settings = {"train.steps": 6, "train.validate_every": 3, "checkpoints.every": 2}


class MLP(nn.Module):
    """The student.

    Args:
        config: The recipe.
        generator: Draws the first weights.
    """

    def __init__(self, config: Config, generator: torch.Generator) -> None:
        super().__init__()
        dtype = getattr(torch, config.train.dtype)
        widths = (config.data.inputs, *config.model.hidden)
        self.layers = nn.ModuleList(nn.Linear(m, n, dtype=dtype) for m, n in pairwise(widths))
        self.head = nn.Linear(widths[-1], 1, dtype=dtype)
        self.activation = ACTIVATIONS[config.model.activation]()
        with torch.no_grad():
            for layer in (*self.layers, self.head):
                bound = layer.in_features**-0.5
                for parameter in (layer.weight, layer.bias):
                    parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """`(points, inputs) -> (points,)`."""
        for layer in self.layers:
            inputs = self.activation(layer(inputs))
        output: Tensor = self.head(inputs)
        return output[..., 0]


def points(config: Config, device: torch.device) -> tuple[Points, Points]:
    """The points to learn from and those to validate on: inputs `(samples, inputs)`, targets `(samples,)`."""
    data, generator = config.data, torch.Generator().manual_seed(config.data.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight, bias, output = normal(data.teacher, data.inputs), normal(data.teacher), normal(data.teacher)

    def draw() -> Points:
        # y = v^T tanh(W x + b) + noise epsilon
        inputs = normal(data.samples, data.inputs)
        clean = torch.tanh(inputs @ weight.T / data.inputs**0.5 + bias) @ output
        targets = clean + data.noise * normal(data.samples)
        dtype = getattr(torch, config.train.dtype)
        return inputs.to(device, dtype), targets.to(device, dtype)

    return draw(), draw()


def _student(config: Config, seed: int) -> tuple[MLP, Tensor]:
    """The student at its start, and the points of every step `(steps, batch)`, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    model = MLP(config, generator)
    shape = (config.train.steps, config.train.batch)
    return model, torch.randint(config.data.samples, shape, generator=generator)


def _validates(config: Config, step: int) -> bool:
    period = config.train.validate_every
    return step == config.train.steps or (period > 0 and step % period == 0)


def train(config: Config, run: Run) -> None:
    """Trains; logs `train/loss`, the mean squared error before a step, and after some `valid/loss`."""
    (inputs, targets), (unseen, unseen_targets) = points(config, run.device)
    model, batches = _student(config, run.seed)
    optimizer = build_optimizer(config.optimizer, model)
    network = run.prepare(model)
    start = run.resume(model, optimizer)

    steps = config.train.steps
    for step in range(start + 1, steps + 1):
        batch = torch.tensor(run.shard(batches[step - 1].tolist()), device=run.device)

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            loss = mse_loss(network(inputs[batch]), targets[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        loss = optimizer.step(closure)  # type: ignore[arg-type]
        run.log({"train/loss": run.mean(float(loss))}, step)
        if _validates(config, step):
            with torch.no_grad():
                run.log({"valid/loss": float(mse_loss(model(unseen), unseen_targets))}, step)
        stop = run.mean(float(run.should_stop)) > 0.0
        if stop or config.checkpoints.due(step, steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            run.report({}, step, checkpoint=state)
        if stop:
            return


def pack_key(config: Config) -> Hashable | None:
    """Trials of equal `[model]`, `[data]` and `[train]` are packed, with optimizers that can be stacked."""
    optimizer = single_optimizer(config.optimizer)
    rule = None if optimizer is None else stack_key(optimizer, config.optimizer.options)
    return None if rule is None else (rule, config.model, config.data, config.train)


def train_many(configs: Sequence[Config], runs: PackedRuns) -> None:
    """`train` for all trials of a pack at once, up to rounding."""
    config, device = configs[0], runs.device
    (inputs, targets), unseen = points(config, device)
    number_of = {seed: number for number, seed in enumerate(dict.fromkeys(runs.seeds))}
    students, batches_of = zip(*(_student(config, seed) for seed in number_of), strict=True)
    student: MLP = students[0]
    # Which of the students each trial starts as, (trials,).
    start = torch.tensor([number_of[seed] for seed in runs.seeds], device=device)
    batches = torch.stack(batches_of, 1).to(device)  # (steps, seeds, batch)
    states, _ = stack_module_state(list(students))
    parameters = {name: states[name].detach().to(device)[start] for name in states}

    section = config.optimizer
    groups = parameter_groups(section, student)
    options = [each.optimizer.options for each in configs]
    optimizer = stack(load_optimizer(section.name), student, groups, options, parameters)

    def loss_of(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        outputs: Tensor = functional_call(student, parameters, (inputs,))
        return mse_loss(outputs, targets)

    gradients_and_losses = vmap(grad_and_value(loss_of))
    losses_of = vmap(loss_of, in_dims=(0, None, None))
    for step in range(1, config.train.steps + 1):
        batch = batches[step - 1][start]
        gradients, losses = gradients_and_losses(parameters, inputs[batch], targets[batch])
        runs.log({"train/loss": losses}, step)
        optimizer.step(gradients)
        if _validates(config, step):
            with torch.no_grad():
                runs.log({"valid/loss": losses_of(parameters, *unseen)}, step)
