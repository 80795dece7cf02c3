"""What a trained network makes of other images: the verb `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from piste.checkpoints import CheckpointError, load, load_model
from piste.errors import BadInput
from piste_workloads.images.config import Config
from piste_workloads.images.networks import build_network
from piste_workloads.images.task import normalised

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@torch.no_grad()
def predict(config: Config, checkpoint: Path, images: str = "", top: int = 3) -> list[dict[str, Any]]:
    """The likeliest classes of images.

    Args:
        config: The recipe of the run that made the checkpoint.
        checkpoint: The checkpoint's folder.
        images: A picture, or a folder of pictures; they are brought to the size of the training images.
        top: How many classes are named, the likeliest first; 0: all.

    Returns:
        A row for each picture and class: `image`, `class`, `probability`.

    Raises:
        BadInput: There is no picture, or one that cannot be read; `top` is negative.
        CheckpointError: There is no checkpoint, or of another workload or architecture.
    """
    if top < 0:
        raise BadInput(f"predict: top = {top} must be at least 0")
    state = load(checkpoint)
    if not {"mean", "deviation", "classes", "shape"} <= state.keys():
        raise CheckpointError(f"checkpoint {checkpoint}: not one of the workload images")
    channels, height, width = state["shape"]
    network = build_network(config.model, channels, height, len(state["classes"]), torch.Generator())
    load_model(network, state["model"], str(checkpoint))
    network.eval()
    rows = []
    for path in _pictures(images):
        pixels = _pixels(path, channels, height, width)[None]
        probabilities = network(normalised(pixels, state["mean"], state["deviation"]))[0].softmax(0)
        for number in probabilities.argsort(descending=True)[: top or None].tolist():
            found = {"class": state["classes"][number], "probability": float(probabilities[number])}
            rows.append({"image": path.name, **found})
    return rows


def _pictures(images: str) -> list[Path]:
    if not images:
        raise BadInput("predict: --images: a picture, or a folder of pictures")
    place = Path(images).expanduser()
    if not place.is_dir():
        return [place]
    found = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise BadInput(f"predict: images = {images}: no picture in this folder")
    return found


def _pixels(path: Path, channels: int, height: int, width: int) -> Tensor:
    """A picture `(channels, height, width)` uint8, resized where it has another size."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            wanted = image.convert("L" if channels == 1 else "RGB").resize((width, height))
    except FileNotFoundError:
        raise BadInput(f"predict: images = {path}: no such file") from None
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"predict: {path} cannot be read: {cause}") from None
    pixels = np.array(wanted, dtype=np.uint8).reshape(height, width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)
