"""People in photographs: a folder in COCO's format, an example a person.

The annotations' JSON has `images` (`id`, `file_name`), `categories` (with `keypoints`, their names) and
`annotations` (`image_id`, `bbox` = x, y, width, height, `keypoints` = x, y, v of each, v = 0: not labelled).
People without a labelled keypoint and crowds are left out (Lin et al., "Microsoft COCO: common objects in
context", arXiv:1405.0312; the format is that of cocodataset.org).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from piste.errors import BadInput, PisteError
from piste_workloads.pose.config import Data
from piste_workloads.pose.examples import Box, Examples, crop, file_hash, pixel_size, to_crop

SIZE = (128, 96)


def read_coco(folder: Path, data: Data) -> Examples:
    """Reads annotations; the images themselves are read when they are asked for.

    A picture is the person's box, each side `data.margin` times as long and one of them longer still, so that
    it has the input's shape; black beyond the image. The length of PCK is the longer side of the box.

    Args:
        folder: The folder.
        data: The recipe's `[data]`.

    Raises:
        BadInput: The annotations cannot be read or have no person in them; an image is not there.
    """
    file = _annotations_file(folder, data)
    table = _table(file)
    size = (data.height or SIZE[0], data.width or SIZE[1])
    try:
        names, people = _people(table)
        files = {image["id"]: folder / data.images / image["file_name"] for image in table["images"]}
        boxes = [square_box(person["bbox"], data.margin, size) for person in people]
        labels = np.array([person["keypoints"] for person in people], np.float64)
        labels = labels.reshape(len(people), len(names), 3)
        paths = [files[person["image_id"]] for person in people]
        lengths = [float(max(person["bbox"][2:])) for person in people]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadInput(f"data.annotations: {file}: not keypoints in COCO's format: {error!r}") from None
    if not people:
        raise BadInput(f"data.annotations: {file}: no person with a labelled keypoint in it")
    sizes = _file_sizes(set(paths))
    numbers = {path: number for number, path in enumerate(sorted(sizes))}
    keypoints = np.stack([to_crop(row[:, :2], box, size) for row, box in zip(labels, boxes, strict=True)])
    pool = ThreadPoolExecutor(data.threads)

    def read(indices: Sequence[int]) -> Tensor:
        crops = pool.map(lambda index: _crop_of(paths[index], boxes[index], size), indices)
        return torch.from_numpy(np.stack(list(crops))).permute(0, 3, 1, 2).contiguous()

    return Examples(
        names=names,
        size=size,
        keypoints=torch.from_numpy(keypoints.astype(np.float32)),
        visible=torch.from_numpy((labels[..., 2] > 0).astype(np.float32)),
        lengths=torch.tensor(lengths),
        scale=torch.from_numpy(np.stack([pixel_size(box, size) for box in boxes]).astype(np.float32)),
        image=torch.tensor([numbers[path] for path in paths]),
        sha256=hashlib.sha256(f"{file_hash(file)}{sorted(sizes.values())}".encode()).hexdigest(),
        read=read,
    )


def square_box(bbox: Sequence[float], margin: float, size: tuple[int, int]) -> Box:
    """The whole pixels around a person: the box, larger by `margin`, in the shape of the network's input.

    Args:
        bbox: x, y, width and height.
        margin: How much longer the sides become.
        size: Height and width of the input.

    Raises:
        ValueError: The box is empty.
    """
    x, y, width, height = (float(value) for value in bbox)
    if not (width > 0.0 and height > 0.0):
        raise ValueError(f"bbox {list(bbox)} is empty")
    wide = max(margin * width, margin * height * size[1] / size[0])
    high = wide * size[0] / size[1]
    left, upper = x + (width - wide) / 2.0, y + (height - high) / 2.0
    return (
        int(np.floor(left)),
        int(np.floor(upper)),
        int(np.ceil(left + wide)),
        int(np.ceil(upper + high)),
    )


def _annotations_file(folder: Path, data: Data) -> Path:
    if data.annotations:
        file = folder / data.annotations
        if not file.is_file():
            raise BadInput(f"data.annotations: {file}: no such file")
        return file
    found = sorted(folder.rglob("*keypoints*.json"))
    if len(found) != 1:
        there = f"{len(found)} are there: name one" if found else "none is there: name the file"
        raise BadInput(f"data.annotations: {folder} needs one *keypoints*.json: {there} in data.annotations")
    return found[0]


def _table(file: Path) -> Mapping[str, Any]:
    try:
        table = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"data.annotations: {file}: cannot be read: {error}") from None
    missing = {"images", "annotations", "categories"} - set(table if isinstance(table, dict) else ())
    if missing:
        raise BadInput(f"data.annotations: {file}: not COCO's format: it has no {min(missing)!r}")
    found: Mapping[str, Any] = table
    return found


def _people(table: Mapping[str, Any]) -> tuple[tuple[str, ...], list[Mapping[str, Any]]]:
    """The names of the keypoints, and the annotations that have any."""
    named = [each for each in table["categories"] if each.get("keypoints")]
    if len(named) != 1:
        raise ValueError(f"{len(named)} categories with keypoints, and there must be one")
    names, category = tuple(named[0]["keypoints"]), named[0].get("id")
    people = [
        each
        for each in table["annotations"]
        if each.get("category_id") == category and not each.get("iscrowd") and any(each["keypoints"][2::3])
    ]
    return names, people


def _file_sizes(paths: set[Path]) -> dict[Path, int]:
    sizes = {}
    for path in sorted(paths):
        try:
            sizes[path] = path.stat().st_size
        except OSError:
            raise BadInput(
                f"data.images: {path}: no such image: set data.images to where they are in data.path"
            ) from None
    return sizes


def _crop_of(path: Path, box: Box, size: tuple[int, int]) -> Any:
    try:
        with Image.open(path) as image:
            return crop(image, box, size)
    except OSError as error:
        raise PisteError(f"{path}: cannot be read: {error}: replace it, or remove its annotations") from None
