"""Keypoint regression as a task: pictures, the heat maps that they are to give, what is scored.

The targets of an example are one tensor `(keypoints + 1, 3)`: x, y and visibility of each keypoint in pixels
of the network's input, and in the last row what its scores are measured with: pixels of the image that was
read to one of the input along x and y, and the length of PCK.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from piste_workloads.pose.config import Augmentation, Config
from piste_workloads.pose.examples import Examples
from piste_workloads.pose.heatmaps import (
    correct_keypoints,
    decode,
    gaussian_maps,
    heat_map_loss,
    pixel_errors,
)
from piste_workloads.pose.model import STRIDE
from piste_workloads.pose.reading import open_examples
from piste_workloads.supervised import Task


class Labels(NamedTuple):
    """The parts of targets `(n, keypoints + 1, 3)`.

    Attributes:
        keypoints: `(n, keypoints, 2)`, in pixels of the network's input.
        visible: `(n, keypoints)`.
        scale: `(n, 2)`.
        lengths: `(n,)`.
    """

    keypoints: Tensor
    visible: Tensor
    scale: Tensor
    lengths: Tensor


def pack(examples: Examples) -> Tensor:
    """The targets of examples."""
    keypoints = torch.cat((examples.keypoints, examples.visible[..., None]), dim=2)
    measures = torch.cat((examples.scale, examples.lengths[:, None]), dim=1)
    return torch.cat((keypoints, measures[:, None]), dim=1)


def unpack(targets: Tensor) -> Labels:
    """The parts of targets."""
    keypoints, measures = targets[:, :-1], targets[:, -1]
    return Labels(keypoints[..., :2], keypoints[..., 2], measures[:, :2], measures[:, 2])


class KeypointTask(Task):
    """Pictures with keypoints.

    Attributes:
        opened: All examples.
        parts: The indices of those of each part.

    Args:
        config: The recipe.
        device: Where pictures and targets are to be.

    Raises:
        BadInput: As `open_examples`.
    """

    score: ClassVar[str] = "pck"

    def __init__(self, config: Config, device: torch.device) -> None:
        self.opened, split = open_examples(config.data)
        self.parts = {"train": split.train, "valid": split.valid, "test": split.test}
        self.sizes: Mapping[str, int] = {name: len(part) for name, part in self.parts.items()}
        self.kept: Mapping[str, Any] = {
            "keypoints": list(self.opened.names),
            "size": list(self.opened.size),
        }
        self._config = config
        self._device = device
        self._targets = pack(self.opened)

    def examples(self, part: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures `(n, 3, height, width)`, values from 0 to 255, and targets `(n, keypoints + 1, 3)`."""
        chosen = [self.parts[part][index] for index in indices.tolist()]
        pictures = self.opened.read(chosen).to(self._device, torch.float32)
        return pictures, self._targets[chosen].to(self._device)

    def batch(self, indices: Tensor, mine: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented pictures and their targets."""
        pictures, targets = self.examples("train", indices[mine])
        section = self._config.augmentation
        device = generator.device
        factors = torch.rand(len(indices), generator=generator, device=device)
        shifts = torch.randint(
            -section.shift, section.shift + 1, (len(indices), 2), generator=generator, device=device
        )
        own = mine.to(device)
        return augment(pictures, targets, section, factors[own], shifts[own])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error of the heat maps."""
        labels = unpack(targets)
        maps = gaussian_maps(labels.keypoints, self._map_size(outputs), STRIDE, self._config.train.sigma)
        return heat_map_loss(outputs, maps, labels.visible)

    def scores(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Of each example the loss, and means over its visible keypoints: PCK and the error in pixels."""
        labels = unpack(targets)
        maps = gaussian_maps(labels.keypoints, self._map_size(outputs), STRIDE, self._config.train.sigma)
        found, _ = decode(outputs, STRIDE)
        errors = pixel_errors(found, labels.keypoints, labels.scale)
        correct = correct_keypoints(errors, labels.lengths, self._config.train.pck_fraction)
        visible = labels.visible
        count = visible.sum(1).clamp(min=1.0)  # an augmented picture may have lost all of them
        return {
            "loss": ((outputs - maps).square().mean((2, 3)) * visible).mean(1),
            "pck": (correct * visible).sum(1) / count,
            "pixel_error": (errors * visible).sum(1) / count,
        }

    @staticmethod
    def _map_size(outputs: Tensor) -> tuple[int, int]:
        return outputs.shape[2], outputs.shape[3]


def augment(
    pictures: Tensor, targets: Tensor, section: Augmentation, factors: Tensor, shifts: Tensor
) -> tuple[Tensor, Tensor]:
    """Pictures made brighter or darker and shifted, with their keypoints; what is shifted out does not count.

    A shifted picture goes on at its edge with the colours of that edge.

    Args:
        pictures: `(batch, 3, height, width)`, values from 0 to 255.
        targets: `(batch, keypoints + 1, 3)`.
        section: How bright they may get.
        factors: Where each picture is between the darkest (0) and the brightest (1), `(batch,)`.
        shifts: To the right and down, in pixels, `(batch, 2)`.
    """
    height, width = pictures.shape[2:]
    rows = (torch.arange(height, device=shifts.device) - shifts[:, 1:]).clamp(0, height - 1)
    columns = (torch.arange(width, device=shifts.device) - shifts[:, :1]).clamp(0, width - 1)
    number = torch.arange(len(pictures), device=shifts.device)[:, None, None]
    # (batch, height, width, channels): the indexed axes are in front
    moved = pictures.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    brightness = 1.0 + section.brightness * (2.0 * factors - 1.0)
    bright = (moved * brightness[:, None, None, None]).clamp(0.0, 255.0)

    targets = targets.clone()
    targets[:, :-1, :2] += shifts[:, None].to(targets.dtype)
    places = targets[:, :-1, :2]
    inside = (places >= -0.5) & (places <= torch.tensor([width, height], device=places.device) - 0.5)
    targets[:, :-1, 2] *= inside.all(2)
    return bright.contiguous(), targets
