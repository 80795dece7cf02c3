"""CIFAR-100: 60,000 colour photographs of 32 x 32 pixels in a hundred classes, the fine ones.

Krizhevsky, "Learning multiple layers of features from tiny images" (2009). No package brings it along: it
comes from a file or folder of your own, or from the Hugging Face hub.
"""

from __future__ import annotations

from pathlib import Path

from piste_workloads.data._cifar import from_files, from_hub
from piste_workloads.data._collections import Layout
from piste_workloads.data._dataset import Dataset

SIZES = {"train": 50_000, "test": 10_000}
PLACES = ("cifar-100-python.tar.gz", "cifar-100-python", "cifar100-jpeg.tar.xz", "train")
LAYOUT = Layout(
    classes=100,
    batches={"train": "train", "test": "test"},
    labels="fine_labels",
    names=("meta", "fine_label_names"),
)


def local(place: Path, split: str | None, skip_bad: bool) -> Dataset:
    """From the official archive or its folder, or an archive or folder of class folders."""
    return from_files("cifar100", LAYOUT, place, split, skip_bad)


def hub(split: str | None) -> Dataset:
    """From `uoft-cs/cifar100`."""
    return from_hub("cifar100", "uoft-cs/cifar100", "fine_label", split)
