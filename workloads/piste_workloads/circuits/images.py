"""Rows of images: a variable a pixel and channel, a category a level of grey."""

from __future__ import annotations

from torch import Tensor

from piste.errors import BadInput
from piste_workloads.circuits.config import Pictures
from piste_workloads.circuits.rows import Encoding, Rows, rows_of
from piste_workloads.data import Dataset, hold_out, load, some

SPLIT_SEED = 0  # the same images are held out whatever a run's seed is


def open_images(section: Pictures) -> Rows:
    """Images of a data set, `(channels, height, width)` in a row each.

    Level `l` of `levels` is the shades s of 256 with `l = floor(s levels / 256)`.

    Raises:
        BadInput: As `piste_workloads.data.load`; there are fewer training images than `rows`.
    """
    whole, test = (
        load(section.name, section.source, section.root, split, SPLIT_SEED) for split in ("train", "test")
    )
    if section.rows > len(whole):
        raise BadInput(f"data.rows = {section.rows}: {section.name} has {len(whole)} training images")
    if section.rows:
        chosen = some(whole, section.rows, SPLIT_SEED)
        group = None if whole.group is None else whole.group[chosen]
        whole = Dataset(whole.x[chosen], whole.y[chosen], whole.meta, group)
    kept, held_out = hold_out(whole, section.validation_fraction, SPLIT_SEED)
    parts = {"train": whole.x[kept], "valid": whole.x[held_out], "test": test.x}
    _, height, width = whole.x.shape[1:]
    if section.patch and (height % section.patch or width % section.patch):
        raise BadInput(
            f"data.patch = {section.patch}: it does not divide the {height} x {width} of {section.name}"
        )
    shape = (whole.x.shape[1], section.patch or height, section.patch or width)
    arrays = {
        part: (patches(x, section.patch).long() * section.levels // 256).flatten(1).numpy()
        for part, x in parts.items()
    }
    encoding = Encoding("numbers", section.levels, shape)
    metas = {"train": whole.meta, "valid": whole.meta, "test": test.meta}
    origin = {
        part: {
            "source": f"{meta.name} of {meta.source} {meta.version[:12]}",
            "real": meta.real,
            "note": meta.note,
        }
        for part, meta in metas.items()
    }
    return rows_of(arrays, encoding, origin)


def patches(images: Tensor, side: int) -> Tensor:
    """Images `(n, channels, height, width)` cut into squares that do not overlap, row by row; 0: whole."""
    if side == 0:
        return images
    channels = images.shape[1]
    # (n, channels, down, across, side, side)
    cut = images.unfold(2, side, side).unfold(3, side, side)
    return cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels, side, side)
