"""The recipe's sections for quantization-aware training."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from piste.config import Optimizer, Section
from piste_workloads.images.config import ImageRecipe, Model


class Quantization(Section):
    """`[quantization]`: the widths of weights and activations."""

    bits: int = Field(default=4, ge=2, le=8, description="of all layers but the first and the last")
    ends: int = Field(default=8, ge=2, le=8, description="bits of the first and the last layer")


class Config(ImageRecipe, frozen=True):
    """Everything that a run of the workload `quantization` is told."""

    workload: str = "quantization"
    optimizer: Optimizer = Optimizer.model_validate({"name": "sgd", "lr": 0.01, "momentum": 0.9})
    model: Model = Model()
    quantization: Quantization = Quantization()
    init_from: Path | None = Field(
        default=None, description="the folder of a checkpoint of the workload images; none: from scratch"
    )

    @model_validator(mode="after")
    def _has_no_curvature(self) -> Self:
        if self.train.sharpness_examples:
            raise ValueError(
                f"train.sharpness_examples = {self.train.sharpness_examples}: the loss of a rounded network "
                "is flat between its jumps and has no sharpness to measure: set it to 0"
            )
        return self
