"""The recipe's sections for image classification."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from piste.config import Optimizer, Section
from piste.errors import nearest
from piste_workloads.data import names, sizes
from piste_workloads.supervised import SupervisedRecipe, Training

Source = Literal["auto", "local", "bundled", "hub"]


class Model(Section):
    """`[model]`: a network; what is left out is the network's own default."""

    name: Literal["mlp", "conv", "resnet", "resnet18", "wide_resnet"] = "conv"
    depth: int | None = Field(default=None, description="resnet: 6 n + 2, 8; wide_resnet: 6 n + 4, 16")
    width: int | None = Field(
        default=None, ge=1, description="first channels (conv: 32, resnet: 16); wide_resnet: its factor, 4"
    )
    hidden: tuple[int, ...] | None = Field(default=None, description="mlp: widths of its hidden layers")

    @property
    def layers(self) -> int:
        """The depth of a `resnet` or `wide_resnet`."""
        return self.depth or {"resnet": 8, "wide_resnet": 16}[self.name]

    @property
    def first_width(self) -> int:
        """The first channels of a `conv` or `resnet`; the factor of a `wide_resnet`."""
        return self.width or {"conv": 32, "resnet": 16, "wide_resnet": 4}[self.name]

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """The hidden widths of an `mlp`."""
        return (256, 256) if self.hidden is None else self.hidden

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        for key, networks in (
            ("depth", {"resnet", "wide_resnet"}),
            ("width", {"conv", "resnet", "wide_resnet"}),
            ("hidden", {"mlp"}),
        ):
            if getattr(self, key) is not None and self.name not in networks:
                raise ValueError(f'{key} is for {" and ".join(sorted(networks))}, and name is "{self.name}"')
        stem = {"resnet": 2, "wide_resnet": 4}.get(self.name)
        if stem is not None and (self.layers <= stem or (self.layers - stem) % 6):
            raise ValueError(
                f"depth = {self.depth} of a {self.name} must be 6 n + {stem}: {6 + stem}, {12 + stem}, ..."
            )
        if any(width < 1 for width in self.hidden_widths):
            raise ValueError(f"hidden = {self.hidden} must be widths of at least 1")
        return self


class Data(Section):
    """`[data]`: which images, and what is done to their labels."""

    name: str = Field(default="photo_patches", description="a data set of `piste_workloads.data`")
    source: Source = Field(default="auto", description="auto: PISTE_DATA, else a package; never the network")
    root: Path | None = Field(default=None, description="a file or folder that holds it")
    normalise: bool = Field(
        default=True, description="mean 0 and deviation 1 of each channel; false: pixels from 0 to 1"
    )
    skip_bad: bool = Field(default=False, description="leave out images that cannot be read")
    seed: int = Field(default=0, ge=0, description="of splits, of `samples` and of drawn patches")
    samples: int = Field(default=0, ge=0, description="training images to use, validation included; 0: all")
    validation_fraction: float = Field(
        default=0.1, ge=0.0, lt=1.0, description="of the training images, with clean labels; 0: none"
    )
    label_noise: float = Field(
        default=0.0, ge=0.0, le=1.0, description="training labels that are drawn anew, from all classes"
    )
    noise_seed: int = Field(default=0, ge=0)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in names():
            raise ValueError(f"unknown data set{nearest(name, names())}")
        return name


class Augmentation(Section):
    """`[augmentation]`: what is done to training images, anew at every step."""

    crop: int = Field(default=0, ge=0, description="pixels by which images are shifted at most")
    flip: bool = Field(default=False, description="half of them are mirrored")
    cutout: int = Field(default=0, ge=0, description="side of the square that is blanked out")


class Train(Training):
    """`[train]` of image classification."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)


class ImageRecipe(SupervisedRecipe):
    """What every recipe has that classifies images."""

    data: Data = Data()
    augmentation: Augmentation = Augmentation()
    train: Train = Train()

    @property
    def examples(self) -> int:
        """How many images there are to train on, if the data set has all that it is known to have."""
        used = self.data.samples or sizes(self.data.name)["train"]
        return used - round(self.data.validation_fraction * used)


class Config(ImageRecipe, frozen=True):
    """Everything that a run of the workload `images` is told."""

    workload: str = "images"
    optimizer: Optimizer = Optimizer.model_validate({"name": "sgd", "lr": 0.05, "momentum": 0.9})
    model: Model = Model()
