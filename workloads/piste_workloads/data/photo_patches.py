"""Patches of ten photographs: which photograph does a patch of 32 x 32 pixels come from?

A made-up task with real pixels, and not to be taken for CIFAR: its classes are ten photographs that
scikit-image and scikit-learn bring along. Patches to learn from lie in the left three quarters of a
photograph, patches to test on in the right quarter, so that no pixel is in both.

The left part is cut into ten strips, and each patch lies within one of them: `group` is its strip, so that a
validation part of whole strips shares no pixel with the rest either.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from piste_workloads.data._cache import cached
from piste_workloads.data._dataset import Arrays, Dataset, Meta, dataset
from piste_workloads.data._packages import module, version

SIZES = {"train": 5000, "test": 1000}
SIDE = 32
STRIPS = 10
PHOTOS = {
    "astronaut": "skimage",
    "chelsea": "skimage",
    "china": "sklearn",
    "coffee": "skimage",
    "flower": "sklearn",
    "hubble_deep_field": "skimage",
    "immunohistochemistry": "skimage",
    "motorcycle": "skimage",
    "retina": "skimage",
    "rocket": "skimage",
}

Pixels = NDArray[np.uint8]


def bundled(split: str | None, seed: int) -> Dataset:
    """From scikit-image and scikit-learn; `x` is `(n, 3, 32, 32)`, drawn with `seed`."""
    versions = [version("photo_patches", package) for package in ("scikit-image", "scikit-learn")]
    found = "-".join(versions)
    arrays = cached(f"photo_patches-{found}-{seed}", lambda: _draw(seed))
    parts = ("train", "test") if split is None else (split,)
    keys = ("x", "y", "group")
    chosen = {key: np.concatenate([arrays[f"{part}_{key}"] for part in parts]) for key in keys}
    meta = Meta(
        name="photo_patches",
        source="scikit-image and scikit-learn",
        version=found,
        licence="BSD-3-Clause (the packages), public domain and CC0 (the photographs)",
        real=False,
        note="a made-up task: which of ten photographs a patch comes from",
        classes=tuple(PHOTOS),
    )
    return dataset(meta, chosen)


def _draw(seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    photos = [_photo(name) for name in PHOTOS]
    found: dict[str, NDArray[np.generic]] = {}
    for part, size in SIZES.items():
        patches, labels, groups = [], [], []
        for label, photo in enumerate(photos):
            for number in range(size // len(photos)):
                strip = number % STRIPS if part == "train" else STRIPS
                patches.append(_patch(photo, strip, generator))
                labels.append(label)
                groups.append(label * (STRIPS + 1) + strip)
        found |= {f"{part}_x": np.stack(patches), f"{part}_y": np.array(labels)}
        found[f"{part}_group"] = np.array(groups)
    return found


def strip_edges(width: int) -> list[int]:
    """Where the strips of a photograph begin, the test's behind the ten others, and where that one ends."""
    left = width * 3 // 4
    return [left * number // STRIPS for number in range(STRIPS + 1)] + [width]


def _patch(photo: Pixels, strip: int, generator: np.random.Generator) -> Pixels:
    """A patch `(3, 32, 32)` from a place in a strip of a photograph `(height, width, 3)`."""
    edges = strip_edges(photo.shape[1])
    row = generator.integers(photo.shape[0] - SIDE + 1)
    column = generator.integers(edges[strip], edges[strip + 1] - SIDE + 1)
    patch: Pixels = photo[row : row + SIDE, column : column + SIDE].transpose(2, 0, 1)
    return patch


def _photo(name: str) -> Pixels:
    """A photograph, `(height, width, 3)`."""
    if PHOTOS[name] == "sklearn":
        pixels = module("sklearn.datasets").load_sample_image(f"{name}.jpg")
    elif name == "motorcycle":
        pixels = module("skimage.data").stereo_motorcycle()[0]
    else:
        pixels = getattr(module("skimage.data"), name)()
    found: Pixels = np.asarray(pixels, dtype=np.uint8)
    return found
