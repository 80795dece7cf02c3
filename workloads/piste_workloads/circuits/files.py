"""Files of rows, in and out: FASTA, text, CSV, Parquet and NPY.

A sequence (of a FASTA file, or a line of a text) is cut into windows of the circuit's length that follow each
other; what the last one lacks is missing. Tables hold numbers that are categories; nothing, -1 or NaN
is a missing value.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from piste.errors import BadInput
from piste_workloads.circuits import fasta
from piste_workloads.circuits.rows import MISSING, Encoding
from piste_workloads.circuits.spelling import spell, spell_sequence
from piste_workloads.circuits.text import encode
from piste_workloads.llm.tokens import Tokenizer

FASTA = (".fa", ".fasta", ".fna", ".fa.gz", ".fasta.gz", ".fna.gz")
TEXT = (".txt",)
TABLES = (".csv", ".parquet", ".npy")
ABSENT = {"", "?", "na", "nan", "none", "null"}


class Given(NamedTuple):
    """Rows of a file.

    Attributes:
        x: `(rows, variables)` int64, -1 where missing.
        names: Of each row: its sequence, or its number from 1.
        starts: Of each row: where it begins in its sequence, from 0.
        lengths: Of each sequence: how long it is; empty for tables.
        columns: The names of the variables.
        note: What was read otherwise than it is written; empty where nothing was.
    """

    x: Tensor
    names: list[str]
    starts: list[int]
    lengths: dict[str, int]
    columns: list[str]
    note: str = ""


def suffix(path: Path, encoding: Encoding, key: str) -> str:
    """How a file's name ends, in lower case.

    Raises:
        BadInput: It is none that these rows can be read from or written to.
    """
    sequences = {"dna": FASTA, "text": TEXT, "tokens": TEXT}.get(encoding.kind, ())
    for known in (*sequences, *TABLES):
        if path.name.lower().endswith(known):
            return known
    usual = [known for known in (*sequences, *TABLES) if not known.endswith(".gz")]
    raise BadInput(f"{key}: {path.name or 'nothing'}: name a file that ends in {', '.join(usual)}")


def column_names(encoding: Encoding) -> list[str]:
    """The variables' names where a file has none: `x0`, `x1`, and so on; a label is `label`."""
    names = [f"x{number}" for number in range(encoding.variables)]
    return [*names[:-1], "label"] if encoding.label else names


def read(path: Path, encoding: Encoding, missing: str = "_") -> Given:
    """Reads a file of rows.

    Args:
        path: The file; how its name ends says what it is.
        encoding: What the circuit's categories mean.
        missing: In a text, stands for a missing character.

    Raises:
        BadInput: It cannot be read, has no rows or other columns, or holds a category that is outside the
            table; row (from 1) and column are named.
    """
    kind = suffix(path, encoding, "input")
    if not path.is_file():
        raise BadInput(f"input: {path}: no such file")
    if kind in FASTA:
        sequences = fasta.read(path, "input")
        return _windows(sequences.records, encoding, sequences.told(), path)
    if kind in TEXT:
        return _read_text(path, encoding, missing)
    try:
        if kind == ".csv":
            columns, values = _read_csv(path)
        elif kind == ".parquet":
            columns, values = _read_parquet(path)
        else:
            columns, values = [], _read_npy(path)
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"input: {path}: cannot be read: {str(error).partition(chr(10))[0]}") from error
    return _checked(path, columns or column_names(encoding), values, encoding)


def _read_text(path: Path, encoding: Encoding, missing: str) -> Given:
    try:
        lines = path.read_bytes().decode("utf-8").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"input: {path}: no UTF-8 text: {error}") from None
    sequences: dict[str, NDArray[np.int64]] = {}
    if encoding.kind == "tokens":
        tokenizer = Tokenizer(encoding.tokenizer)
        for number, line in enumerate(lines, start=1):
            if line:
                sequences[f"line {number}"] = tokenizer.encode(line).astype(np.int64)
        return _windows(sequences, encoding, "", path)
    if len(missing) != 1 or missing in encoding.alphabet:
        raise BadInput(
            f"missing = {missing!r}: use one character that is not in the circuit's alphabet, such as _"
        )
    unknown = 0
    for number, line in enumerate(lines, start=1):
        if line:
            found = encode(line, encoding.alphabet + missing, lower=encoding.lower)
            unknown += int((found < 0).sum())
            sequences[f"line {number}"] = np.where(found == len(encoding.alphabet), MISSING, found)
    note = f"characters outside the alphabet count as missing: {unknown}" if unknown else ""
    return _windows(sequences, encoding, note, path)


def _windows(sequences: Mapping[str, NDArray[np.int64]], encoding: Encoding, note: str, path: Path) -> Given:
    length = encoding.shape[0]
    rows, names, starts = [], [], []
    for name, values in sequences.items():
        for start in range(0, len(values), length):
            row = np.full(encoding.variables, MISSING)
            row[: len(values[start : start + length])] = values[start : start + length]
            rows.append(row)
            names.append(name)
            starts.append(start)
    if not rows:
        raise BadInput(f"input: {path}: there are no rows in it")
    lengths = {name: len(values) for name, values in sequences.items()}
    return Given(torch.from_numpy(np.stack(rows)), names, starts, lengths, column_names(encoding), note)


def _read_csv(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    """The columns' names (none where the first line is numbers) and the values, NaN where missing."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.reader(file) if line]
    if not lines:
        return [], np.empty((0, 0))
    columns = lines.pop(0) if any(_number(cell) is None for cell in lines[0]) else []
    width = len(columns or lines[0])
    values = np.empty((len(lines), width))
    for row, line in enumerate(lines):
        if len(line) != width:
            raise BadInput(f"input: {path}: row {row + 1} has {len(line)} columns, and the first has {width}")
        for column, cell in enumerate(line):
            number = _number(cell)
            if number is None:
                where = columns[column] if columns else f"x{column}"
                raise BadInput(f"input: {path}: row {row + 1}, column {where}: {cell!r} is no number")
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


def _read_npy(path: Path) -> NDArray[np.float64]:
    array = np.load(path, allow_pickle=False)
    if array.ndim < 2:
        raise BadInput(
            f"input: {path}: an array of shape {array.shape}: rows are its first axis, and it needs two"
        )
    rows: NDArray[np.float64] = array.reshape(len(array), int(np.prod(array.shape[1:]))).astype(np.float64)
    return rows


def _checked(path: Path, columns: list[str], values: NDArray[np.float64], encoding: Encoding) -> Given:
    if len(values) == 0:
        raise BadInput(f"input: {path}: there are no rows in it")
    if values.shape[1] != encoding.variables:
        raise BadInput(
            f"input: {path}: it has {values.shape[1]} columns, and the circuit {encoding.variables} variables"
        )
    limits = np.full(encoding.variables, encoding.categories)
    if encoding.label:
        limits[-1] = encoding.label
    absent = np.isnan(values)
    known = np.where(absent, MISSING, values)
    outside = (known < MISSING) | (known >= limits) | (known != np.floor(known))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise BadInput(
            f"input: {path}: row {row + 1}, column {columns[column]}: {values[row, column]:g} is no "
            f"category: use a whole number from 0 to {limits[column] - 1}, or nothing where it is missing"
        )
    names = [str(number) for number in range(1, len(values) + 1)]
    x = torch.from_numpy(known.astype(np.int64))
    return Given(x, names, [0] * len(names), {}, columns)


def write(path: Path, x: Tensor, encoding: Encoding, like: Given | None = None) -> None:
    """Writes rows.

    Args:
        path: The file; how its name ends says what it becomes.
        x: `(rows, variables)`.
        encoding: What the categories mean.
        like: Where the rows were read from: sequences get their names and lengths back; None: every row is a
            sequence of its own.

    Raises:
        BadInput: It cannot be written.
    """
    kind = suffix(path, encoding, "output")
    try:
        if kind in FASTA:
            content = fasta.write(_joined(x, encoding, like))
            path.write_bytes(fasta.compressed(content) if kind.endswith(".gz") else content.encode())
        elif kind in TEXT:
            path.write_text("\n".join(_lines(x, encoding, like)) + "\n", encoding="utf-8")
        elif kind == ".npy":
            np.save(path, x.numpy())
        else:
            columns = column_names(encoding) if like is None else like.columns
            write_table(path, dict(zip(columns, x.T.tolist(), strict=True)))
    except OSError as error:
        raise BadInput(f"output: {path}: cannot be written: {error.strerror}") from None


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes columns of equal length as CSV or Parquet, by how the file's name ends."""
    if path.name.lower().endswith(".parquet"):
        table = importlib.import_module("pyarrow").table({name: list(each) for name, each in columns.items()})
        importlib.import_module("pyarrow.parquet").write_table(table, path)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def spelled(x: Tensor, encoding: Encoding, like: Given) -> list[str]:
    """Rows that were read from a file in writing: its sequences, or the rows of its table."""
    if not like.lengths:
        return spell(x, encoding)
    return [spell_sequence(values, encoding) for _, values in _joined(x, encoding, like)]


def _joined(x: Tensor, encoding: Encoding, like: Given | None) -> list[tuple[str, NDArray[np.int64]]]:
    """The sequences that rows are windows of, with their names."""
    windows = x[:, : encoding.shape[0]].numpy()
    if like is None or not like.lengths:
        return [(f"row-{number}", row) for number, row in enumerate(windows, start=1)]
    found: dict[str, list[NDArray[np.int64]]] = {}
    for name, row in zip(like.names, windows, strict=True):
        found.setdefault(name, []).append(row)
    return [(name, np.concatenate(rows)[: like.lengths[name]]) for name, rows in found.items()]


def _lines(x: Tensor, encoding: Encoding, like: Given | None) -> list[str]:
    """The lines of a text that rows are windows of; a line break within one is a space."""
    lines = (spell_sequence(values, encoding) for _, values in _joined(x, encoding, like))
    return [line.replace("\r", " ").replace("\n", " ") for line in lines]
