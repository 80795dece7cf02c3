"""Frames of a DeepLabCut project: `labeled-data/VIDEO/*.png` and the CSV with their labels.

`CollectedData_SCORER.csv` has three rows of heads, `scorer`, `bodyparts` and `coords` (x and y in turn), then
a row a frame: its path in the project (in one column, or its parts in three) and the coordinates in pixels,
empty where there is no label (Mathis et al., "DeepLabCut: markerless pose estimation of user-defined body
parts with deep learning", Nature Neuroscience, 2018). Projects with several animals, which have a row
`individuals`, are not read.
"""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from piste.errors import BadInput
from piste_workloads.pose.config import Data
from piste_workloads.pose.examples import Examples, crop, file_hash
from piste_workloads.pose.frames import frames

LABELED = "labeled-data"


def read_project(folder: Path, data: Data) -> Examples:
    """Reads all labelled frames of a project into memory; a frame is as one of an `.npz`.

    Raises:
        BadInput: There are no labels, the videos differ in size or body parts, or a frame cannot be read.
    """
    files = sorted(folder.glob(f"{LABELED}/*/CollectedData_*.csv"))
    if not files:
        raise BadInput(f"data.path: {folder}: no {LABELED}/VIDEO/CollectedData_SCORER.csv in it")
    names: tuple[str, ...] = ()
    paths: list[Path] = []
    rows: list[list[float]] = []
    for file in files:
        own, labels = _labels(file)
        if names and own != names:
            raise BadInput(f"data.path: {file}: body parts {', '.join(own)}, and before {', '.join(names)}")
        names = own
        paths += [folder / path for path in labels]
        rows += labels.values()
    keypoints = np.array(rows).reshape(len(rows), len(names), 2)
    labelled = np.isfinite(keypoints).all(axis=2).any(axis=1)
    paths = [path for path, keep in zip(paths, labelled, strict=True) if keep]
    if not paths:
        raise BadInput(f"data.path: {folder}: no frame with a label in it")
    with _open(paths[0]) as image:
        read_size = (image.height, image.width)
    size = (data.height or read_size[0], data.width or read_size[1])
    images = np.stack([_picture(path, read_size, size) for path in paths])
    hashes = "".join(map(file_hash, [*files, *paths]))
    digest = hashlib.sha256(hashes.encode()).hexdigest()
    return frames(images, keypoints[labelled], names, read_size, digest)


def _labels(file: Path) -> tuple[tuple[str, ...], dict[str, list[float]]]:
    """The names of the body parts, and of each frame's path the coordinates."""
    with file.open(newline="", encoding="utf-8") as lines:
        heads = list(csv.reader(lines))
    rows = heads[3:]
    if [row[0] for row in heads[:3] if row] != ["scorer", "bodyparts", "coords"] or "x" not in heads[2]:
        raise BadInput(f"data.path: {file}: its first rows must be scorer, bodyparts and coords")
    first = heads[2].index("x")
    names = tuple(heads[1][first::2])
    if heads[2][first:] != ["x", "y"] * len(names):
        raise BadInput(f"data.path: {file}: its columns must be x and y of each body part in turn")
    try:
        found = {
            "/".join(row[:first]): [float(cell) if cell else float("nan") for cell in row[first:]]
            for row in rows
        }
    except ValueError as error:
        raise BadInput(f"data.path: {file}: {error}") from None
    for path, values in found.items():
        if len(values) != 2 * len(names):
            raise BadInput(f"data.path: {file}: {path} has {len(values)} coordinates of {2 * len(names)}")
    return names, found


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except OSError as error:
        raise BadInput(f"data.path: {path}: cannot be read: {error}") from None


def _picture(path: Path, read_size: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
    with _open(path) as image:
        if (image.height, image.width) != read_size:
            raise BadInput(
                f"data.path: {path}: {image.height} x {image.width} pixels, and the first frame has "
                f"{read_size[0]} x {read_size[1]}: all must have one size"
            )
        try:
            return crop(image, (0, 0, read_size[1], read_size[0]), size)
        except OSError as error:
            raise BadInput(f"data.path: {path}: cannot be read: {error}") from None
