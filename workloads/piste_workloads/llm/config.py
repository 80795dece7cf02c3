"""The recipe's sections for training a language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from piste.config import Recipe, Section
from piste_workloads.schedule import Schedule

Mlp = Literal["swiglu", "gelu"]
Source = Literal["kjv", "file", "hub"]


class Model(Section):
    """`[model]`: a decoder-only transformer."""

    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    width: int = Field(default=96, ge=2, description="width of the residual stream")
    context: int = Field(default=128, ge=1, description="tokens that the model sees")
    mlp: Mlp = "swiglu"
    tied: bool = Field(default=True, description="the head is the token embedding's matrix")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @property
    def mlp_width(self) -> int:
        """The MLP's hidden width: 4 width for GELU; 8/3 width, up to a multiple of 8, for SwiGLU."""
        return 4 * self.width if self.mlp == "gelu" else -(-8 * self.width // 3 // 8) * 8

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width = {self.width} must be an even multiple of heads = {self.heads}: "
                f"rotary positions turn pairs of a head's coordinates; use {2 * self.heads} x N"
            )
        return self


class Text(Section):
    """`[data]` of a model that brings its own tokenizer: a text."""

    source: Source = Field(default="kjv", description="the King James Bible, a file, or the hub")
    path: Path | None = Field(default=None, description="source = file: a UTF-8 text")
    name: str | None = Field(default=None, description="source = hub: the data set, `owner/name`")
    config: str | None = Field(default=None, description="source = hub: its configuration")
    split: str = Field(default="train", description="source = hub: its split")
    column: str = Field(default="text", description="source = hub: its column of texts")
    max_characters: int = Field(default=100_000_000, ge=1, description="source = hub: where reading ends")
    validation_fraction: float = Field(default=0.05, gt=0.0, lt=1.0, description="the end of the text")

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        for source, key, value in (("file", "path", self.path), ("hub", "name", self.name)):
            if self.source == source and value is None:
                raise ValueError(f'source = "{source}" needs data.{key}')
            if self.source != source and value is not None:
                raise ValueError(f'{key} is for source = "{source}", and source is "{self.source}"')
        return self


class Data(Text):
    """`[data]`: a text, and the tokens that are made of it."""

    vocab_size: int = Field(default=2048, ge=256, description="byte-level BPE tokens; 256: plain bytes")


class Train(Schedule):
    """`[train]`: how long, on how much, how fast."""

    steps: int = Field(default=300, ge=1)
    batch: int = Field(default=16, ge=1, description="sequences a step, over all workers")
    accumulate: int = Field(default=1, ge=1, description="micro-batches of a worker a step")
    clip: float = Field(default=1.0, ge=0.0, description="largest norm of the whole gradient; 0: off")
    validate_every: int = Field(default=50, ge=0, description="steps; 0: at the end alone")
    validation_batches: int = Field(default=8, ge=1, description="batches of the held-out text")
    sample_every: int = Field(default=0, ge=0, description="steps; 0: at the end alone")
    samples: int = Field(default=4, ge=0, description="generated texts; 0: none")
    sample_tokens: int = Field(default=64, ge=1, description="tokens of a generated text")
    non_finite_steps: int = Field(default=10, ge=1, description="losses in a row before the run fails")
    compile: bool = Field(default=False, description="torch.compile the model")
    bf16: bool | Literal["auto"] = Field(default="auto", description="bfloat16 autocast; auto: on GPUs")

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} must be below steps = {self.steps}")
        return self


class TextRecipe(Recipe, ABC):
    """What every recipe has that trains a language model on a text."""

    data: Text = Text()
    train: Train = Train()

    @property
    @abstractmethod
    def context(self) -> int:
        """How many tokens the model sees."""

    @property
    def total_steps(self) -> int:
        """Where the run ends, for progress and ETA."""
        return self.train.steps

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        parts = self.resources.workers * self.train.accumulate
        if self.train.batch % parts:
            raise ValueError(
                f"train.batch = {self.train.batch} must be a multiple of resources.workers x "
                f"train.accumulate = {self.resources.workers} x {self.train.accumulate} = {parts}"
            )
        return self


class Config(TextRecipe, frozen=True):
    """Everything that a run of the workload `llm` is told."""

    workload: str = "llm"
    model: Model = Model()
    data: Data = Data()
    init_from: Path | None = Field(default=None, description="fine-tuning: the folder of a checkpoint")

    @property
    def context(self) -> int:
        """How many tokens the model sees."""
        return self.model.context
