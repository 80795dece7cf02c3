"""Rows of images: a variable a pixel and channel, a category a level of grey."""

from __future__ import annotations

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
    arrays = {part: (x.long() * section.levels // 256).flatten(1).numpy() for part, x in parts.items()}
    encoding = Encoding("numbers", section.levels, tuple(whole.x.shape[1:]))
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
