"""Tiny sets of pictures with keypoints: bright blobs on a dark ground, in every format that is read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NAMES = ("red", "blue")


def blobs(
    count: int = 24, size: tuple[int, int] = (24, 32), seed: int = 0, radius: float = 2.0
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Pictures with a red and a blue blob: `(count, height, width, 3)`, and their centres `(count, 2, 2)`."""
    generator = np.random.default_rng(seed)
    low, high = np.full(2, 2 * radius), np.array(size[::-1]) - 1 - 2 * radius
    keypoints = generator.uniform(low, high, (count, 2, 2)).astype(np.float32)
    rows, columns = np.indices(size)
    pictures = np.full((count, *size, 3), 20.0)
    for number in range(count):
        for channel, (x, y) in zip((0, 2), keypoints[number], strict=True):
            bump = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * radius**2))
            pictures[number, ..., channel] += 220.0 * bump
    return pictures.astype(np.uint8), keypoints


def save_npz(path: Path, count: int = 24) -> Path:
    """Saves blobs as an `.npz`."""
    pictures, keypoints = blobs(count)
    np.savez(path, images=pictures, keypoints=keypoints, bodyparts=np.array(NAMES))
    return path


def save_coco(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """Saves blobs as a COCO folder: two people a photograph, and some that are to be left out.

    A person is a blob picture in its box. The second person's blue keypoint is not labelled.
    """
    height, width = 24, 32
    pictures, keypoints = blobs(2 * count, (height, width), seed)
    (folder / "photos").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for number in range(count):
        photo = np.zeros((40, 80, 3), np.uint8)
        image = {"id": 100 + number, "file_name": f"{number:03d}.png", "height": 40, "width": 80}
        images.append(image)
        for place in range(2):
            index = 2 * number + place
            x, y = 5 + 38 * place, 6 + 4 * place
            photo[y : y + height, x : x + width] = pictures[index]
            points = [[float(a) + x, float(b) + y, 2] for a, b in keypoints[index]]
            if place == 1:
                points[1] = [0, 0, 0]
            annotations.append(
                {
                    "id": index,
                    "image_id": 100 + number,
                    "category_id": 1,
                    "iscrowd": 0,
                    "bbox": [x, y, width, height],
                    "num_keypoints": 2 - place,
                    "keypoints": [value for point in points for value in point],
                }
            )
        Image.fromarray(photo).save(folder / "photos" / f"{number:03d}.png")
    crowd = {**annotations[0], "iscrowd": 1, "id": 9000}
    nobody = {**annotations[0], "keypoints": [0] * 6, "num_keypoints": 0, "id": 9001}
    table = {
        "images": images,
        "annotations": [*annotations, crowd, nobody],
        "categories": [{"id": 1, "name": "person", "keypoints": list(NAMES)}, {"id": 2, "name": "dog"}],
    }
    (folder / "annotations" / "person_keypoints_tiny.json").write_text(json.dumps(table), encoding="utf-8")
    return folder


def save_project(folder: Path, count: int = 6, columns: int = 1) -> Path:
    """Saves blobs as a DeepLabCut project; the last frame has no label."""
    pictures, keypoints = blobs(count)
    video = folder / "labeled-data" / "film"
    video.mkdir(parents=True)
    heads: list[list[object]] = [
        ["scorer", *[""] * (columns - 1), *["me"] * 4],
        ["bodyparts", *[""] * (columns - 1), *[name for name in NAMES for _ in "xy"]],
        ["coords", *[""] * (columns - 1), *["x", "y"] * 2],
    ]
    for number, picture in enumerate(pictures):
        parts = ["labeled-data", "film", f"img{number:03d}.png"]
        Image.fromarray(picture).save(folder.joinpath(*parts))
        cells = [""] * 4 if number == count - 1 else [repr(float(v)) for v in keypoints[number].ravel()]
        heads.append([*(parts if columns == 3 else ["/".join(parts)]), *cells])
    with (video / "CollectedData_me.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(heads)
    return folder
