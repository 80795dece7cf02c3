"""Labelled pictures of one size, whatever they were read from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from piste.errors import BadInput
from piste_workloads.pose.config import Data

Box = tuple[int, int, int, int]  # left, upper, right, lower; the last two excluded


@dataclass(frozen=True)
class Examples:
    """Pictures with keypoints; all tensors are on the CPU, and float32 where nothing else is said.

    Attributes:
        names: What the keypoints are called.
        size: Height and width of every picture, as the network gets it.
        keypoints: x and y in pixels of such a picture, 0 the middle of the first, `(n, keypoints, 2)`.
        visible: 1 where a keypoint counts, else 0, `(n, keypoints)`.
        lengths: The length that PCK is a fraction of, in pixels of the image that was read, `(n,)`.
        scale: Pixels of that image to one of the picture along x and y, `(n, 2)`.
        image: The number of the image that an example is part of, `(n,)` int64.
        sha256: The hash of what was read.
        read: Makes pictures of examples: `(b, 3, height, width)` uint8.
    """

    names: tuple[str, ...]
    size: tuple[int, int]
    keypoints: Tensor
    visible: Tensor
    lengths: Tensor
    scale: Tensor
    image: Tensor
    sha256: str
    read: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.keypoints)


@dataclass(frozen=True)
class Split:
    """Indices of examples, ascending.

    Attributes:
        train: To learn from.
        valid: To choose by.
        test: To judge by, at the end.
    """

    train: list[int]
    valid: list[int]
    test: list[int]


def split(examples: Examples, data: Data) -> Split:
    """Splits examples by image: those of one image are in one part.

    Raises:
        BadInput: A part would be empty.
    """
    images = torch.unique(examples.image)
    order = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(data.seed))]
    valid, test = (round(share * len(images)) for share in (data.validation_fraction, data.test_fraction))
    if min(valid, test, len(images) - valid - test) < 1:
        raise BadInput(
            f"data: {len(images)} images are too few for data.validation_fraction = "
            f"{data.validation_fraction:g} and data.test_fraction = {data.test_fraction:g}: "
            f"{len(images) - valid - test} to train on, {valid} to validate, {test} to test"
        )

    def of(chosen: Tensor) -> list[int]:
        found: list[int] = torch.isin(examples.image, chosen).nonzero()[:, 0].tolist()
        return found

    return Split(of(order[valid + test :]), of(order[:valid]), of(order[valid : valid + test]))


def find(path: Path) -> Path:
    """Where `data.path` is: as it is given, or in the folder that PISTE_DATA names.

    Raises:
        BadInput: In neither place; the message says what to get and where to put it.
    """
    folder = os.environ.get("PISTE_DATA")
    for place in (path, Path(folder) / path) if folder else (path,):
        if place.exists():
            return place
    where = f"nor in PISTE_DATA = {folder}" if folder else "and PISTE_DATA is not set"
    raise BadInput(
        f"data.path: {path} is not here {where}: get {HOW_TO_GET}, and set data.path to it, or put it there"
    )


HOW_TO_GET = (
    "an .npz with images (n, height, width, 3) uint8 and keypoints (n, k, 2) in pixels, a COCO folder with "
    "person_keypoints_val2017.json and its images (cocodataset.org), or the folder "
    "examples/openfield-Pranav-2018-10-30 of github.com/DeepLabCut/DeepLabCut"
)


def crop(image: Image.Image, box: Box, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A part of an image, black where it goes beyond it, resized to `(height, width, 3)`."""
    part = image.convert("RGB").crop(box)
    return np.asarray(part.resize(size[::-1], Image.Resampling.BILINEAR))


def to_crop(points: NDArray[np.float64], box: Box, size: tuple[int, int]) -> NDArray[np.float64]:
    """Points `(..., 2)` of an image in pixels of a crop of it."""
    corner, factor = np.array(box[:2]), 1.0 / pixel_size(box, size)
    # u + 1/2 = (x - x_0 + 1/2) W / w: the middle of the first pixel is 0
    inside: NDArray[np.float64] = (points - corner + 0.5) * factor - 0.5
    return inside


def from_crop(points: NDArray[np.float64], box: Box, size: tuple[int, int]) -> NDArray[np.float64]:
    """The inverse of `to_crop`."""
    outside: NDArray[np.float64] = (points + 0.5) * pixel_size(box, size) - 0.5 + np.array(box[:2])
    return outside


def pixel_size(box: Box, size: tuple[int, int]) -> NDArray[np.float64]:
    """Pixels of an image to one of a crop of it, along x and y."""
    return np.array([(box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]])


def file_hash(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
