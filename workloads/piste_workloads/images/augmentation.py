"""Augmentation of a batch of images: shifts, mirror images, and blank squares, all drawn at once.

What is drawn, is drawn for the whole batch in a fixed order, so that a worker that has a share of it treats
its images as a lone worker would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from piste_workloads.images.config import Augmentation


@dataclass(frozen=True)
class Draws:
    """What happens to each image of a batch.

    Attributes:
        shift: `(batch, 2)` int64, rows and columns in `[0, 2 crop]`; `crop` leaves the image where it is.
        mirrored: `(batch,)` bool.
        centre: `(batch, 2)` int64, the row and column in the middle of the blank square.
    """

    shift: Tensor
    mirrored: Tensor
    centre: Tensor

    def of(self, chosen: Tensor) -> Draws:
        """Those of some images of the batch."""
        return Draws(self.shift[chosen], self.mirrored[chosen], self.centre[chosen])


def draw(section: Augmentation, batch: int, height: int, width: int, generator: torch.Generator) -> Draws:
    """Draws what happens to each image of a batch, on the generator's device."""
    device = generator.device

    def below(bound: int) -> Tensor:
        return torch.randint(bound, (batch,), generator=generator, device=device)

    shift = torch.stack([below(2 * section.crop + 1), below(2 * section.crop + 1)], 1)
    mirrored = below(2).bool()
    return Draws(shift, mirrored, torch.stack([below(height), below(width)], 1))


def augment(images: Tensor, section: Augmentation, draws: Draws) -> Tensor:
    """Augmented images.

    Args:
        images: `(batch, channels, height, width)`, normalised, so that 0 is the mean colour.
        section: What is done: `crop` pads with 0 on all sides and cuts at a random place, `flip` mirrors left
            and right (both as in He et al., arXiv:1512.03385), `cutout` sets a square to 0 whose middle lies
            anywhere in the image (DeVries and Taylor, arXiv:1708.04552).
        draws: Of this batch.
    """
    if section.crop:
        images = _shifted(images, section.crop, draws.shift)
    if section.flip:
        images = torch.where(draws.mirrored[:, None, None, None], images.flip(-1), images)
    if section.cutout:
        images = images.masked_fill(_squares(images, section.cutout, draws.centre), 0.0)
    return images


def _shifted(images: Tensor, padding: int, shift: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    padded = pad(images, (padding, padding, padding, padding))
    rows = shift[:, 0, None] + torch.arange(height, device=images.device)  # (batch, height)
    columns = shift[:, 1, None] + torch.arange(width, device=images.device)  # (batch, width)
    number = torch.arange(len(images), device=images.device)[:, None, None]
    # (batch, height, width, channels): the indexed axes are in front
    return padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _squares(images: Tensor, side: int, centre: Tensor) -> Tensor:
    """Which pixels are blanked out, `(batch, 1, height, width)`; parts beyond the image are lost."""
    inside = []
    for axis, length in enumerate(images.shape[-2:]):
        first = centre[:, axis, None] - side // 2
        place = torch.arange(length, device=images.device)
        inside.append((place >= first) & (place < first + side))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
