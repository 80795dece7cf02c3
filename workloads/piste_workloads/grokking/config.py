"""The recipe's sections for grokking: which task, which network, how long."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from piste.config import Optimizer, Recipe, Section
from piste_workloads.data import sizes
from piste_workloads.schedule import Schedule


class Modular(Section):
    """`[task]` with name `addition` or `multiplication`: all pairs of numbers below a modulus."""

    networks: ClassVar[tuple[str, ...]] = ("two-layer", "deep", "transformer")

    name: Literal["addition", "multiplication"] = "addition"
    modulus: int = Field(default=97, description="p, at least 3")
    train_fraction: float = Field(default=0.5, gt=0.0, lt=1.0, description="of the p^2 pairs")
    validation_fraction: float = Field(default=0.5, gt=0.0, lt=1.0, description="of the pairs left over")

    @property
    def train_points(self) -> int:
        """How many pairs are trained on."""
        return int(self.modulus**2 * self.train_fraction)

    @property
    def validation_points(self) -> int:
        """How many pairs are validated on; the others are the test."""
        return int((self.modulus**2 - self.train_points) * self.validation_fraction)

    @property
    def inputs(self) -> int:
        """The width of a point: two numbers, one-hot."""
        return 2 * self.modulus

    @property
    def outputs(self) -> int:
        """How many classes there are."""
        return self.modulus

    @model_validator(mode="after")
    def _splits(self) -> Self:
        if self.modulus < 3:
            raise ValueError(f"modulus = {self.modulus}: it must be at least 3, such as 97")
        rest = self.modulus**2 - self.train_points - self.validation_points
        if min(self.train_points, self.validation_points, rest) < 1:
            raise ValueError(
                f"of {self.modulus**2} pairs {self.train_points} are for training, {self.validation_points} "
                f"for validation and {rest} for the test: choose fractions that leave some for each"
            )
        return self


class Parity(Section):
    """`[task]` with name `parity`: the product of some secret bits among many, each -1 or 1."""

    networks: ClassVar[tuple[str, ...]] = ("two-layer", "deep")

    name: Literal["parity"] = "parity"
    bits: int = Field(default=400, ge=1, description="n, of a point")
    secret: int = Field(default=2, ge=1, description="k, how many of them decide; at most `bits`")
    train_points: int = Field(default=2000, ge=1)
    validation_points: int = Field(default=2000, ge=1)
    test_points: int = Field(default=10_000, ge=1)
    loss: Literal["squared", "hinge"] = Field(
        default="squared", description="squared as in the released code, hinge as in the paper's text"
    )

    @property
    def inputs(self) -> int:
        """The width of a point."""
        return self.bits

    @property
    def outputs(self) -> int:
        """One: its sign is the answer."""
        return 1

    @model_validator(mode="after")
    def _enough_bits(self) -> Self:
        if self.secret > self.bits:
            raise ValueError(
                f"secret = {self.secret} parity bits of bits = {self.bits}: use at least as many inputs"
            )
        return self


class Digits(Section):
    """`[task]` with name `digits`: handwritten digits, few of them, by the squared error on one-hots."""

    networks: ClassVar[tuple[str, ...]] = ("two-layer", "deep")
    inputs: ClassVar[int] = 784
    outputs: ClassVar[int] = 10

    name: Literal["digits"] = "digits"
    train_points: int = Field(default=1000, ge=1)
    validation_points: int = Field(default=1000, ge=1, description="of the images left over")

    @model_validator(mode="after")
    def _enough_images(self) -> Self:
        images = sizes("mnist5k")["train"]
        if self.train_points + self.validation_points > images:
            raise ValueError(
                f"train_points = {self.train_points} and validation_points = {self.validation_points} "
                f"are more than the {images} images of mnist5k: lower one"
            )
        return self


class Toy(Section):
    """`[task]` with name `toy`: a linear problem in two directions, one of them slow."""

    networks: ClassVar[tuple[str, ...]] = ("linear",)
    inputs: ClassVar[int] = 2
    outputs: ClassVar[int] = 1

    name: Literal["toy"] = "toy"
    epsilon: float = Field(default=0.1, gt=0.0, description="variance along the slow direction")
    margin: float = Field(default=0.5, ge=0.0, description="s: no training point is nearer to the boundary")
    angle: float = Field(
        default=math.pi / 4, gt=0.0, lt=math.pi / 2, description="theta: test points lie above it"
    )
    start: tuple[float, float] = Field(default=(1.0, 10.0), description="the first weights")
    samples: int = Field(default=0, ge=0, description="training points; 0: the population's moments")
    equal: bool = Field(default=False, description="the modified scheme: all directions at equal speed")
    test_points: int = Field(default=1000, ge=1, description="and as many for validation")

    @property
    def train_points(self) -> int:
        """The population's moments are those of eight points."""
        return self.samples or 8

    @model_validator(mode="after")
    def _leans(self) -> Self:
        if self.start[1] == 0.0:
            raise ValueError("start = [.., 0]: without a second weight there is nothing to unlearn")
        return self


class TwoLayer(Section):
    """`[model]` with name `two-layer`: the paper's network, one hidden layer of ReLUs, no output bias."""

    name: Literal["two-layer"] = "two-layer"
    width: int = Field(default=512, ge=1)
    random_bias: bool = Field(default=False, description="first biases from N(0, 2 / inputs), not 0")


class Deep(Section):
    """`[model]` with name `deep`: ReLU layers with biases, torch's first weights times `scale`."""

    name: Literal["deep"] = "deep"
    layers: int = Field(default=3, ge=2, description="matrices")
    width: int = Field(default=200, ge=1)
    scale: float = Field(default=8.0, gt=0.0, description="of all first weights and biases")


class Transformer(Section):
    """`[model]` with name `transformer`: a decoder on the tokens `a`, the operation, `b`, `=`."""

    name: Literal["transformer"] = "transformer"
    layers: int = Field(default=2, ge=1)
    width: int = Field(default=128, ge=1)
    heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} must be a multiple of heads = {self.heads}")
        return self


class Linear(Section):
    """`[model]` with name `linear`: two weights, for the toy."""

    name: Literal["linear"] = "linear"


Task = Modular | Parity | Digits | Toy
Model = TwoLayer | Deep | Transformer | Linear


class Train(Schedule):
    """`[train]`: how long, how fast, and what is looked at."""

    epochs: int = Field(default=300, ge=1)
    batch: int = Field(default=512, ge=0, description="points of a step, over all workers; 0: all of them")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="constant", description="of the learning rate"
    )
    warmup_steps: int = Field(default=0, ge=0, description="linear warm-up")
    target: float = Field(
        default=0.95, gt=0.0, le=1.0, description="validation accuracy that counts as grokked"
    )
    epochs_after_target: int | None = Field(
        default=None, ge=0, description="epochs until the run ends once the target is reached; none: all"
    )
    evaluate_every: int = Field(default=1, ge=1, description="epochs between validations, which are logged")
    test_every: int = Field(default=10, ge=1, description="epochs between tests, at validations")
    dtype: Literal["float32", "float64"] = "float32"


class Config(Recipe, frozen=True):
    """Everything that a run of the workload `grokking` is told."""

    workload: str = "grokking"
    optimizer: Optimizer = Optimizer.model_validate({"name": "sgd", "lr": 0.7, "weight_decay": 1e-4})
    task: Annotated[Task, Field(discriminator="name")] = Modular(name="addition")
    model: Annotated[Model, Field(discriminator="name")] = TwoLayer(name="two-layer")
    train: Train = Train()

    @property
    def total_steps(self) -> int:
        """Where a run of this configuration ends at the latest: a step of its metrics is an epoch."""
        return self.train.epochs

    @property
    def batch(self) -> int:
        """Points of an optimizer's step."""
        return self.train.batch or self.task.train_points

    @property
    def batches(self) -> int:
        """The optimizer's steps in an epoch; a last batch that would be smaller is left out."""
        return self.task.train_points // self.batch

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model.name not in self.task.networks:
            fitting = " or ".join(f'"{name}"' for name in self.task.networks)
            raise ValueError(f'model.name = "{self.model.name}" cannot do {self.task.name}: use {fitting}')
        if self.batch > self.task.train_points:
            raise ValueError(
                f"train.batch = {self.batch} is more than the {self.task.train_points} training points: "
                "lower it, or set it to 0 for all of them"
            )
        if self.batch % self.resources.workers:
            raise ValueError(
                f"a batch of {self.batch} cannot be shared by resources.workers = {self.resources.workers}: "
                "set train.batch to a multiple of it"
            )
        return self
