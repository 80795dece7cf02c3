"""Handwritten digits of 8 x 8 pixels in 17 shades: 1,797 images, the smallest real task.

The test set of the UCI collection (Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998),
which scikit-learn brings along. It has no split of its own; 1,000 are to learn from.
"""

from __future__ import annotations

import numpy as np

from piste_workloads.data._cache import cached
from piste_workloads.data._dataset import Arrays, Dataset, Meta
from piste_workloads.data._packages import module, version
from piste_workloads.data._splits import split_at_random

SIZES = {"train": 1000, "test": 797}


def bundled(split: str | None, seed: int) -> Dataset:
    """From scikit-learn; `x` is `(n, 1, 8, 8)`, its shades 0 to 16 spread over 0 to 255."""
    found = version("digits", "scikit-learn")
    arrays = cached(f"digits-scikit-learn-{found}", _read)
    meta = Meta(
        name="digits",
        source="scikit-learn",
        version=found,
        licence="BSD-3-Clause (the package), CC BY (UCI)",
        real=True,
        classes=tuple("0123456789"),
    )
    return split_at_random(meta, arrays, split, SIZES["test"], seed)


def _read() -> Arrays:
    found = module("sklearn.datasets").load_digits()
    shades = np.rint(found.images * (255.0 / 16.0)).astype(np.uint8)
    return {"x": shades[:, None], "y": found.target}
