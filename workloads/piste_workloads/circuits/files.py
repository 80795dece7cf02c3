"""Files of rows, in and out: FASTA, text, CSV, Parquet and NPY.

A sequence (of a FASTA file, or a line of a text) is cut into windows of the circuit's length that follow each
other; what the last one lacks is missing. Tables hold numbers that are categories; nothing, -1 or NaN
is a missing value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from piste.errors import BadInput
from piste_workloads.circuits import fasta, tables
from piste_workloads.circuits.rows import MISSING, Encoding
from piste_workloads.circuits.spelling import spell, spell_sequence
from piste_workloads.circuits.text import encode, normalised
from piste_workloads.llm.tokens import Tokenizer

FASTA = (".fa", ".fasta", ".fna", ".fa.gz", ".fasta.gz", ".fna.gz")
TEXT = (".txt",)


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
    for known in (*sequences, *tables.SUFFIXES):
        if path.name.lower().endswith(known):
            return known
    usual = [known for known in (*sequences, *tables.SUFFIXES) if not known.endswith(".gz")]
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
    if kind in FASTA:
        sequences = fasta.read(path, "input")
        return _windows(sequences.records, encoding, sequences.told(), path)
    if kind in TEXT:
        return _read_text(path, encoding, missing)
    columns, values = tables.read(path, "input")
    if values.shape[1] != encoding.variables:
        raise BadInput(
            f"input: {path}: it has {values.shape[1]} columns, and the circuit {encoding.variables} variables"
        )
    limits = np.full(encoding.variables, encoding.categories)
    if encoding.label:
        limits[-1] = encoding.label
    columns = columns or column_names(encoding)
    x = torch.from_numpy(tables.categories(values, limits, columns, f"input: {path}"))
    return Given(x, [str(number) for number in range(1, len(x) + 1)], [0] * len(x), {}, columns)


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
    known = encoding.alphabet + missing
    unknown = changed = 0
    for number, line in enumerate(lines, start=1):
        if line:
            found = encode(line, known, lower=encoding.lower)
            unknown += int((found < 0).sum())
            changed += encoding.lower and normalised(line, known) != line
            sequences[f"line {number}"] = np.where(found == len(encoding.alphabet), MISSING, found)
    note = f"characters outside the alphabet count as missing: {unknown}" if unknown else ""
    if changed:
        note = f"upper case counts as lower case, all else than letters as one space; such lines: {changed}"
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
            tables.write(path, dict(zip(columns, x.T.tolist(), strict=True)))
    except OSError as error:
        raise BadInput(f"output: {path}: cannot be written: {error.strerror}") from None


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
