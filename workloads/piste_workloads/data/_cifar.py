"""What CIFAR-10 and CIFAR-100 share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from piste_workloads.data._collections import SPLITS, Layout, read_collection
from piste_workloads.data._dataset import Dataset, Meta, dataset
from piste_workloads.data._hub import read_hub

LICENCE = "none stated; for research, cite Krizhevsky (2009)"


def from_files(name: str, layout: Layout, place: Path, split: str | None, skip_bad: bool) -> Dataset:
    """One part, or both, of a file or folder of your own.

    Raises:
        BadInput: As `read_collection`.
    """
    # A folder of batches or class folders is found by what is in it.
    inside = place.name in {"data_batch_1", "train"}
    collection = read_collection(place.parent if inside else place, layout, skip_bad)
    parts = [collection.parts[each] for each in (SPLITS if split is None else (split,))]
    meta = Meta(
        name=name,
        source=str(place),
        version=collection.version,
        licence=LICENCE,
        real=True,
        note="decoded pictures, which may differ from the official arrays" if collection.pictures else "",
        classes=collection.classes,
        skipped=collection.skipped,
    )
    x, y = (np.concatenate(each) for each in zip(*parts, strict=True))
    return dataset(meta, {"x": x, "y": y})


def from_hub(name: str, repository: str, label: str, split: str | None) -> Dataset:
    """One part, or both, of the hub's copy.

    Raises:
        BadInput: As `read_hub`.
    """
    arrays = read_hub(repository, "img", label)
    parts = SPLITS if split is None else (split,)
    meta = Meta(
        name=name,
        source=f"Hugging Face hub, {repository}",
        version="",
        licence=LICENCE,
        real=True,
        classes=tuple(map(str, arrays["classes"])),
    )
    chosen = {key: np.concatenate([arrays[f"{key}_{part}"] for part in parts]) for key in "xy"}
    return dataset(meta, chosen)
