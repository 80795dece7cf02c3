"""The recipe's sections for keypoint regression."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from piste.config import Optimizer, Section
from piste_workloads.supervised import SupervisedRecipe, Training

OPENFIELD = Path("pose/openfield_116x120x160.npz")


class Model(Section):
    """`[model]`: an encoder that halves the picture, and a decoder that doubles it again."""

    width: int = Field(default=16, ge=1, description="channels at a quarter of the input; levels double")
    levels: int = Field(default=2, ge=1, description="halvings of the encoder after the first two")


class Data(Section):
    """`[data]`: labelled pictures, and how they are split."""

    path: Path = Field(default=OPENFIELD, description="an .npz or a COCO folder, here or in $PISTE_DATA")
    annotations: str = Field(
        default="", description="COCO: the JSON file, in the folder; empty: its only *keypoints*.json"
    )
    images: str = Field(default="", description="COCO: where the images are, in the folder")
    margin: float = Field(default=1.25, ge=1.0, description="COCO: side of the crop / side of the box")
    threads: int = Field(default=4, ge=1, description="COCO: images that are read at a time")
    height: int | None = Field(
        default=None, ge=16, description="of the network's input; none: the frames', 128 for crops"
    )
    width: int | None = Field(default=None, ge=16, description="as height; 96 for crops")
    validation_fraction: float = Field(default=0.15, gt=0.0, lt=1.0, description="of the images")
    test_fraction: float = Field(default=0.15, gt=0.0, lt=1.0, description="of the images")
    seed: int = Field(default=0, ge=0, description="of the split")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("give height and width, or neither")
        held = self.validation_fraction + self.test_fraction
        if held >= 1.0:
            raise ValueError(
                f"validation_fraction + test_fraction = {held:g} leaves nothing to train on: below 1"
            )
        return self


class Augmentation(Section):
    """`[augmentation]`: what is done to training pictures, anew at every step."""

    brightness: float = Field(default=0.2, ge=0.0, lt=1.0, description="a factor from 1 - b to 1 + b")
    shift: int = Field(default=8, ge=0, description="the longest shift along each axis, in pixels")


class Train(Training):
    """`[train]` of keypoint regression."""

    epochs: int = Field(default=40, ge=1)
    batch: int = Field(default=16, ge=1, description="examples a step, over all workers")
    sigma: float = Field(default=2.0, gt=0.0, description="of the bumps, in pixels of a heat map")
    pck_fraction: float = Field(
        default=0.2, gt=0.0, description="a keypoint is correct within this share of the example's length"
    )


class Config(SupervisedRecipe, frozen=True):
    """Everything that a run of the workload `pose` is told."""

    workload: str = "pose"
    optimizer: Optimizer = Optimizer.model_validate({"name": "sgd", "lr": 1.0, "momentum": 0.9})
    model: Model = Model()
    data: Data = Data()
    augmentation: Augmentation = Augmentation()
    train: Train = Train()

    @property
    def examples(self) -> int:
        """How many pictures there are to train on.

        Raises:
            BadInput: They cannot be had.
        """
        from piste_workloads.pose.reading import open_examples

        return len(open_examples(self.data)[1].train)
