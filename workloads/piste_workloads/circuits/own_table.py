"""Rows of a table of one's own."""

from __future__ import annotations

import math

import numpy as np

from piste.errors import BadInput
from piste_workloads.circuits import tables
from piste_workloads.circuits.config import Table
from piste_workloads.circuits.rows import PARTS, Encoding, Rows, rows_of

SPLIT_SEED = 0  # the same rows are held out whatever a run's seed is


def open_table(section: Table) -> Rows:
    """The rows of a CSV, Parquet or NPY file, split at random.

    Raises:
        BadInput: As `tables.read` and `tables.categories`; the rows are not of the given shape.
    """
    path, what = section.path.expanduser(), f"data.path: {section.path}"
    columns, values = tables.read(path, "data.path")
    width = values.shape[1]
    if section.shape is not None and math.prod(section.shape) != width:
        raise BadInput(
            f"data.shape = {list(section.shape)}: it is of {math.prod(section.shape)} values, and {path} has "
            f"{width} columns"
        )
    # The largest value and one; where a value is no whole number, the check below tells so.
    count = section.categories or max(2, int(np.nanmax(values, initial=0.0)) + 1)
    names = columns or [f"x{number}" for number in range(width)]
    rows = tables.categories(values, np.full(width, count), names, what)
    rows = rows[np.random.default_rng(SPLIT_SEED).permutation(len(rows))]
    valid, test = (round(len(rows) * part) for part in (section.validation_fraction, section.test_fraction))
    train = len(rows) - valid - test
    arrays = dict(zip(PARTS, np.split(rows, [train, train + valid]), strict=True))
    encoding = Encoding("numbers", count, section.shape or (width,))
    origin = {"source": str(section.path), "real": True, "note": ""}
    return rows_of(arrays, encoding, dict.fromkeys(PARTS, origin))
