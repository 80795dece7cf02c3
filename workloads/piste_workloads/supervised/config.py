"""What the recipes of supervised workloads have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, Self

from pydantic import Field, model_validator

from piste.config import Recipe
from piste_workloads.schedule import Schedule


class Training(Schedule):
    """`[train]`: how long, on how much, how fast, and what is measured."""

    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=64, ge=1, description="examples a step, over all workers")
    accumulate: int = Field(default=1, ge=1, description="micro-batches of a worker a step")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine", description="of the learning rate; wsd: warm-up, stable, decay"
    )
    warmup_steps: int = Field(default=0, ge=0, description="linear warm-up")
    validate_every: int = Field(default=1, ge=0, description="epochs; 0: at the end alone")
    test_every: int = Field(
        default=0, ge=0, description="epochs between looks at the test part, for curves; 0: at the end alone"
    )
    evaluation_batch: int = Field(default=500, ge=1, description="examples that are evaluated at once")
    sharpness_examples: int = Field(
        default=0, ge=0, description="training examples on which the sharpness is measured; 0: it is not"
    )
    sharpness_every: int = Field(default=0, ge=0, description="epochs; 0: at the end alone")
    non_finite_steps: int = Field(default=10, ge=1, description="losses in a row before the run fails")
    bf16: bool | Literal["auto"] = Field(default="auto", description="bfloat16 autocast; auto: on GPUs")


class SupervisedRecipe(Recipe, ABC):
    """What every recipe has whose workload trains a network on labelled examples."""

    train: Training = Training()

    @property
    @abstractmethod
    def examples(self) -> int:
        """How many examples there are to train on, as far as that is known without them."""

    @property
    def total_steps(self) -> int:
        """Where the run ends, for progress and ETA."""
        return self.train.epochs * max(1, self.examples // self.train.batch)

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        parts = self.resources.workers * self.train.accumulate
        if self.train.batch % parts:
            raise ValueError(
                f"train.batch = {self.train.batch} must be a multiple of resources.workers x "
                f"train.accumulate = {self.resources.workers} x {self.train.accumulate} = {parts}"
            )
        return self
