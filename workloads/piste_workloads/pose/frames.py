"""Frames of a video, in one file: `images` and `keypoints` of an `.npz`."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from piste.errors import BadInput
from piste_workloads.pose.config import Data
from piste_workloads.pose.examples import Examples, crop, file_hash, pixel_size, to_crop


def read_frames(path: Path, data: Data) -> Examples:
    """Reads an `.npz` of frames; every frame is an image of its own to the split.

    `images` is `(n, height, width, 3)` uint8; `keypoints` `(n, k, 2)`, x and y in pixels, NaN where there is
    none; the names `bodyparts` `(k,)` may be missing. The length of PCK is the longer side of the box around
    a frame's keypoints. Frames that follow each other look alike, so held-out frames chosen at random are
    easier than those of another video would be.

    Raises:
        BadInput: The file is not such an `.npz`.
    """
    images, keypoints, names = _arrays(path)
    height, width = images.shape[1:3]
    size = (data.height or height, data.width or width)
    if size != (height, width):
        whole = (0, 0, width, height)
        images = np.stack([crop(Image.fromarray(image), whole, size) for image in images])
    return frames(images, keypoints, names, (height, width), file_hash(path))


def frames(
    images: NDArray[np.uint8],
    keypoints: NDArray[np.float64],
    names: tuple[str, ...],
    read_size: tuple[int, int],
    sha256: str,
) -> Examples:
    """Examples of frames in memory.

    Args:
        images: `(n, height, width, 3)`, as the network gets them.
        keypoints: `(n, k, 2)` in pixels of the frames that were read.
        names: Of the keypoints.
        read_size: Height and width of those frames.
        sha256: The hash of what was read.
    """
    size = (images.shape[1], images.shape[2])
    whole = (0, 0, read_size[1], read_size[0])
    visible = np.isfinite(keypoints.sum(axis=2))
    sides = np.nanmax(keypoints, axis=1) - np.nanmin(keypoints, axis=1)
    pictures = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)

    def read(indices: Sequence[int]) -> Tensor:
        return pictures[torch.as_tensor(indices, dtype=torch.int64)].contiguous()

    return Examples(
        names=names,
        size=size,
        keypoints=_tensor(to_crop(np.nan_to_num(keypoints), whole, size)),
        visible=_tensor(visible),
        lengths=_tensor(sides.max(axis=1)),
        scale=_tensor(np.broadcast_to(pixel_size(whole, size), (len(images), 2))),
        image=torch.arange(len(images)),
        sha256=sha256,
        read=read,
    )


def _tensor(values: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _arrays(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.float64], tuple[str, ...]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise BadInput(f"data.path: {path}: not an .npz of arrays, nor a folder") from None
    for name in ("images", "keypoints"):
        if name not in found:
            there = ", ".join(sorted(found)) or "nothing"
            raise BadInput(f"data.path: {path}: it has no array {name!r}; there are: {there}")
    images, keypoints = found["images"], found["keypoints"]
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise BadInput(
            f"data.path: {path}: images must be (n, height, width, 3) uint8, got {images.shape} "
            f"{images.dtype}"
        )
    if keypoints.ndim != 3 or keypoints.shape[::2] != (len(images), 2) or keypoints.dtype.kind != "f":
        raise BadInput(
            f"data.path: {path}: keypoints must be ({len(images)}, k, 2) numbers, got {keypoints.shape} "
            f"{keypoints.dtype}"
        )
    count = keypoints.shape[1]
    if not np.isfinite(keypoints).all(axis=2).any(axis=1).all():
        raise BadInput(f"data.path: {path}: a frame has no keypoint: leave it out")
    names = tuple(map(str, found["bodyparts"])) if "bodyparts" in found else tuple(map(str, range(count)))
    return images, keypoints.astype(np.float64), names
