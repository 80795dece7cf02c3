"""Image classification as a task: the images of a recipe, split, with noise on their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from piste.errors import BadInput
from piste_workloads.data import Dataset, Meta, hold_out, load, some
from piste_workloads.images.augmentation import augment, draw
from piste_workloads.images.config import Data, ImageRecipe
from piste_workloads.supervised import Task, check

Part = tuple[Tensor, Tensor]  # images (n, channels, height, width) uint8, labels (n,) int64


class Images(NamedTuple):
    """The images of a recipe.

    Attributes:
        parts: `train`, `test`, and `valid` where a part is held out.
        origins: Where `train`, with `valid`, and `test` come from.
    """

    parts: dict[str, Part]
    origins: dict[str, Meta]


def open_images(section: Data) -> Images:
    """Loads the images of a recipe, splits them, and draws the noise of their labels.

    Raises:
        BadInput: As `piste_workloads.data.load`; there are fewer training images than `samples`; a part is
            empty.
    """
    whole, test = (
        load(section.name, section.source, section.root, split, section.seed, section.skip_bad)
        for split in ("train", "test")
    )
    if section.samples > len(whole):
        raise BadInput(f"data.samples = {section.samples}: {section.name} has {len(whole)} training images")
    used = whole
    if section.samples:
        chosen = some(whole, section.samples, section.seed)
        group = None if whole.group is None else whole.group[chosen]
        used = Dataset(whole.x[chosen], whole.y[chosen], whole.meta, group)
    kept, held_out = hold_out(used, section.validation_fraction, section.seed)
    labels = noisy(used.y[kept], section.label_noise, len(whole.meta.classes), section.noise_seed)
    parts = {"train": (used.x[kept], labels), "test": (test.x, test.y)}
    if section.validation_fraction > 0.0:
        parts["valid"] = (used.x[held_out], used.y[held_out])
    for name, (images, _) in parts.items():
        if len(images) == 0:
            raise BadInput(f"data: the {name} part is empty: use more images or another validation_fraction")
    return Images(parts, {"train": whole.meta, "test": test.meta})


def data_hash(config: ImageRecipe) -> str:
    """The hash of all images and labels that a recipe uses; makes the cache where there is one.

    Raises:
        BadInput: As `open_images`; they are too few for the recipe's batch or workers.
    """
    parts, origins = open_images(config.data)
    check(config, {name: len(labels) for name, (_, labels) in parts.items()})
    digest = hashlib.sha256(origins["train"].sha256.encode())
    for name in sorted(parts):
        for tensor in parts[name]:
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def noisy(labels: Tensor, fraction: float, classes: int, seed: int) -> Tensor:
    """Labels of which a fraction, exact to rounding, is drawn anew from all classes, their own included."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    result = labels.clone()
    result[chosen] = torch.randint(classes, (len(chosen),), generator=generator)
    return result


class Classification(Task):
    """Images with labels; inputs are normalised by the training images' mean and deviation of each channel.

    Without `data.normalise` that mean is 0 and that deviation 1: pixels from 0, which is black, to 1.

    Args:
        config: The recipe.
        device: Where the images are to be.

    Attributes:
        shape: Channels, height and width of an image.
        classes: The names of the labels.
        origins: Where `train`, with `valid`, and `test` come from.

    Raises:
        BadInput: As `open_images`.
    """

    def __init__(self, config: ImageRecipe, device: torch.device) -> None:
        parts, self.origins = open_images(config.data)
        self.classes = self.origins["train"].classes
        channels, height, width = parts["train"][0].shape[1:]
        self.shape = (int(channels), int(height), int(width))
        self.sizes: Mapping[str, int] = {name: len(labels) for name, (_, labels) in parts.items()}
        self._parts = {name: (x.to(device), y.to(device)) for name, (x, y) in parts.items()}
        self._augmentation = config.augmentation
        self._label_smoothing = config.train.label_smoothing
        mean, deviation = torch.zeros(self.shape[0]), torch.ones(self.shape[0])
        if config.data.normalise:
            mean, deviation = statistics(parts["train"][0])
        self.mean, self.deviation = mean.to(device), deviation.to(device)
        self.kept: Mapping[str, Any] = {
            "mean": mean,
            "deviation": deviation,
            "classes": list(self.classes),
            "shape": list(self.shape),
        }

    def examples(self, part: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images `(n, channels, height, width)` and labels `(n,)`, as they are."""
        images, labels = self._parts[part]
        chosen = indices.to(images.device)
        return normalised(images[chosen], self.mean, self.deviation), labels[chosen]

    def batch(self, indices: Tensor, mine: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Normalised, augmented images and labels of this worker's share of a batch."""
        images, labels = self.examples("train", indices[mine])
        _, height, width = self.shape
        draws = draw(self._augmentation, len(indices), height, width, generator)
        return augment(images, self._augmentation, draws.of(mine.to(images.device))), labels

    def table(self) -> list[dict[str, Any]]:
        """Where the images come from, a row a split, and what was left out of them."""
        told = ("name", "source", "version", "licence", "real", "note", "n", "sha256")
        return [
            {"split": split, **{key: getattr(meta, key) for key in told}, "skipped": "; ".join(meta.skipped)}
            for split, meta in self.origins.items()
        ]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats, with the recipe's label smoothing."""
        return cross_entropy(outputs, targets, label_smoothing=self._label_smoothing)

    def scores(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Each image's cross-entropy in nats, and 1 where the likeliest class is the label."""
        loss = cross_entropy(outputs, targets, reduction="none")
        return {"loss": loss, "accuracy": (outputs.argmax(1) == targets).float()}


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, `(channels,)` each, of images with values from 0 to 1.

    A channel that never changes has deviation 1.
    """
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
    values, weights = torch.arange(256, dtype=torch.float64) / 255.0, counts.double() / counts[0].sum()
    mean = weights @ values
    variance = weights @ values.square() - mean.square()
    deviation = variance.clamp(min=0.0).sqrt()
    return mean.float(), torch.where(deviation > 0.0, deviation, 1.0).float()


def normalised(images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Images `(n, channels, height, width)` uint8 as float32 with mean 0 and deviation 1 of each channel."""
    return (images.float() / 255.0 - mean[:, None, None]) / deviation[:, None, None]
