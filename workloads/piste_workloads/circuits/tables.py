"""Tables of categories in files: CSV, Parquet and NPY, in and out."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from piste.errors import BadInput
from piste_workloads.circuits.rows import MISSING

SUFFIXES = (".csv", ".parquet", ".npy")
ABSENT = {"", "?", "na", "nan", "none", "null"}  # cells of a CSV that are missing values


def read(path: Path, what: str) -> tuple[list[str], NDArray[np.float64]]:
    """Reads a table of numbers.

    Args:
        path: The file; how its name ends says what it is.
        what: What to call it in a message.

    Returns:
        The columns' names, empty where there are none, and the values `(rows, columns)`, NaN where missing.

    Raises:
        BadInput: It cannot be read, has no rows, or holds something that is no number; row (from 1) and
            column are named.
    """
    if not path.is_file():
        raise BadInput(f"{what}: {path}: no such file")
    name = path.name.lower()
    readers = {".csv": _read_csv, ".parquet": _read_parquet, ".npy": _read_npy}
    reader = next((reader for suffix, reader in readers.items() if name.endswith(suffix)), None)
    if reader is None:
        raise BadInput(f"{what}: {path}: name a file that ends in {', '.join(SUFFIXES)}")
    try:
        columns, values = reader(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{what}: {path}: {str(error).partition(chr(10))[0]}") from error
    if len(values) == 0:
        raise BadInput(f"{what}: {path}: there are no rows in it")
    return columns, values


def categories(
    values: NDArray[np.float64], limits: NDArray[np.integer], columns: Sequence[str], what: str
) -> NDArray[np.int64]:
    """Values as categories, -1 where missing.

    Args:
        values: `(rows, columns)`, NaN or -1 where missing.
        limits: How many categories each column has.
        columns: Their names.
        what: What to call the table in a message.

    Raises:
        BadInput: A value is no category; row (from 1) and column are named.
    """
    known = np.where(np.isnan(values), MISSING, values)
    outside = (known < MISSING) | (known >= limits) | (known != np.floor(known))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise BadInput(
            f"{what}: row {row + 1}, column {columns[column]}: {values[row, column]:g} is no category: use a "
            f"whole number from 0 to {limits[column] - 1}, or nothing where it is missing"
        )
    return known.astype(np.int64)


def write(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes columns of equal length as CSV or Parquet, by how the file's name ends."""
    if path.name.lower().endswith(".parquet"):
        table = importlib.import_module("pyarrow").table({name: list(each) for name, each in columns.items()})
        importlib.import_module("pyarrow.parquet").write_table(table, path)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _read_csv(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    """The first line is names where something in it is no number."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.reader(file) if line]
    if not lines:
        return [], np.empty((0, 0))
    columns = lines.pop(0) if any(_number(cell) is None for cell in lines[0]) else []
    width = len(columns or lines[0])
    values = np.empty((len(lines), width))
    for row, line in enumerate(lines):
        if len(line) != width:
            raise ValueError(f"row {row + 1} has {len(line)} columns, and the first has {width}")
        for column, cell in enumerate(line):
            number = _number(cell)
            if number is None:
                where = columns[column] if columns else f"x{column}"
                raise ValueError(
                    f"row {row + 1}, column {where}: {cell!r} is no number: a missing value is an empty cell"
                )
            values[row, column] = number
    return columns, values


def _number(cell: str) -> float | None:
    if cell.strip().lower() in ABSENT:
        return np.nan
    try:
        return float(cell)
    except ValueError:
        return None


def _read_parquet(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    table = importlib.import_module("pyarrow.parquet").read_table(path)
    columns = [
        np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)
        for column in table.columns
    ]
    return list(table.column_names), np.stack(columns, 1) if columns else np.empty((0, 0))


def _read_npy(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    try:
        array = np.load(path, allow_pickle=False)
    except (EOFError, ValueError):
        raise ValueError("it is no NPY file of numbers") from None
    if array.ndim < 2:
        raise ValueError(f"an array of shape {array.shape}: rows are its first axis, and it needs two")
    return [], array.reshape(len(array), int(np.prod(array.shape[1:]))).astype(np.float64)
