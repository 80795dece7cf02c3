"""Training of a keypoint detector, and what it finds in an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from piste.checkpoints import CheckpointError, load, load_model
from piste.errors import BadInput
from piste.workload import Run
from piste_workloads.pose.config import Config
from piste_workloads.pose.examples import crop, from_crop
from piste_workloads.pose.heatmaps import decode
from piste_workloads.pose.model import STRIDE, HeatMaps
from piste_workloads.pose.pictures import overlay
from piste_workloads.pose.task import KeypointTask, unpack
from piste_workloads.supervised import check, fit

SHOWN = 6  # examples in the picture


def prepare_data(config: Config) -> str:
    """Reads the pictures (of a COCO folder, the annotations), once and before any worker.

    Returns:
        Their hash; of a COCO folder, that of the annotations and of the sizes of the images' files.

    Raises:
        BadInput: There are none, and then the message says what to get and where to put it; they cannot be
            read; there are too few.
    """
    task = KeypointTask(config, torch.device("cpu"))
    check(config, task.sizes)
    return task.opened.sha256


def train(config: Config, run: Run) -> None:
    """Trains a network from its start; leaves behind what `piste_workloads.supervised.fit` does.

    The picture `keypoints` shows examples of the test part with true and predicted keypoints.

    Raises:
        BadInput: As `prepare_data`.
        PisteError: As `fit`; an image cannot be read.
    """
    task = KeypointTask(config, run.device)
    generator = torch.Generator().manual_seed(run.seed)
    model = HeatMaps(config.model, len(task.opened.names), generator)
    fit(config, run, model, task)
    if run.stopped is None and run.rank == 0:
        pictures, targets = task.examples("test", torch.arange(min(SHOWN, task.sizes["test"])))
        labels = unpack(targets)
        found, _ = find_keypoints(model, pictures)
        run.figure("keypoints", overlay(pictures, labels.keypoints, labels.visible, found, task.opened.names))


@torch.no_grad()
def find_keypoints(model: HeatMaps, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Keypoints `(n, keypoints, 2)` in pixels of the pictures `(n, 3, height, width)`, and their heat."""
    model.eval()
    return decode(model(pictures).float(), STRIDE)


def predict(config: Config, checkpoint: Path, image: str = "", box: str = "") -> list[dict[str, Any]]:
    """Finds keypoints in an image file.

    Args:
        config: The recipe of the run that made the checkpoint.
        checkpoint: The checkpoint's folder.
        image: The file.
        box: The part of it that is looked at, `"left,upper,right,lower"` in whole pixels; empty: all of it. A
            network that was trained on a COCO folder wants a box around one person.

    Returns:
        One row a keypoint: `keypoint`, `x` and `y` in pixels of the file, and `heat`, from about 0 (nowhere)
        to 1.

    Raises:
        BadInput: The image cannot be read, or the box is none.
        CheckpointError: There is no checkpoint, or of another architecture.
    """
    state = load(checkpoint)
    if "keypoints" not in state:
        raise CheckpointError(f"checkpoint {checkpoint}: not one of the workload pose")
    names, (height, width) = state["keypoints"], state["size"]
    model = HeatMaps(config.model, len(names), torch.Generator())
    load_model(model, state["model"], str(checkpoint))
    try:
        with Image.open(image) as opened:
            part = _box(box) if box else (0, 0, opened.width, opened.height)
            pixels = crop(opened, part, (height, width))
    except OSError as error:
        raise BadInput(f"predict: image = {image!r} cannot be read: {error}") from None
    pictures = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    found, heat = find_keypoints(model, pictures)
    places = from_crop(found[0].double().numpy(), part, (height, width))
    return [
        {"keypoint": name, "x": float(x), "y": float(y), "heat": float(value)}
        for name, (x, y), value in zip(names, places, heat[0], strict=True)
    ]


def _box(text: str) -> tuple[int, int, int, int]:
    try:
        left, upper, right, lower = (int(part) for part in text.split(","))
    except ValueError:
        left = upper = right = lower = 0
    if not (left < right and upper < lower):
        raise BadInput(f"predict: box = {text!r} must be left,upper,right,lower in whole pixels")
    return left, upper, right, lower
