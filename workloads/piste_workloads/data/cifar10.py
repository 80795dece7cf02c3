"""CIFAR-10: 60,000 colour photographs of 32 x 32 pixels in ten classes.

Krizhevsky, "Learning multiple layers of features from tiny images" (2009). No package brings it along: it
comes from a file or folder of your own, or from the Hugging Face hub.
"""

from __future__ import annotations

from pathlib import Path

from piste_workloads.data._cifar import from_files, from_hub
from piste_workloads.data._collections import Layout
from piste_workloads.data._dataset import Dataset

SIZES = {"train": 50_000, "test": 10_000}
PLACES = (
    "cifar-10-python.tar.gz",
    "cifar-10-batches-py",
    "cifar10-jpeg.tar.xz",
    "cifar10_jpeg_5k_1k.npz",
    "data_batch_1",
    "train",
)
LAYOUT = Layout(
    classes=10,
    batches={"train": r"data_batch_\d+", "test": "test_batch"},
    labels="labels",
    names=("batches.meta", "label_names"),
)


def local(place: Path, split: str | None, skip_bad: bool) -> Dataset:
    """From the official archive or its folder, an archive or folder of class folders, or an npz."""
    return from_files("cifar10", LAYOUT, place, split, skip_bad)


def hub(split: str | None) -> Dataset:
    """From `uoft-cs/cifar10`."""
    return from_hub("cifar10", "uoft-cs/cifar10", "label", split)
