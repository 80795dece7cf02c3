"""Rows to learn from: what every kind of data is made into."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from piste.errors import BadInput

PARTS = ("train", "valid", "test")
MISSING = -1


@dataclass(frozen=True)
class Encoding:
    """What categories mean: how files become rows and rows files. A checkpoint holds it.

    Attributes:
        kind: `text` (a letter of `alphabet` a category), `tokens` (of `tokenizer`), `dna` (A, C, G, T), or
            `numbers`, which stand for themselves.
        categories: How many there are.
        shape: How a row's variables are arranged: `(length,)`, or an image's `(channels, height, width)`.
        alphabet: kind = text: the letters, in the order of their categories.
        lower: kind = text: upper case counts as lower case, and runs of all else as one space.
        tokenizer: kind = tokens: what `piste_workloads.llm.tokens.Tokenizer` takes.
        label: The last variable, behind those of `shape`, is a label of so many classes; 0: there is none.
    """

    kind: str
    categories: int
    shape: tuple[int, ...]
    alphabet: str = ""
    lower: bool = False
    tokenizer: str = ""
    label: int = 0

    @property
    def variables(self) -> int:
        """Columns of a row."""
        return int(np.prod(self.shape)) + (self.label > 0)

    @property
    def array(self) -> tuple[int, ...]:
        """The sides of the array that the variables fill: an image's, or all of them in a line."""
        sides = tuple(side for side in self.shape if side > 1)
        return (self.variables,) if self.label or not sides else sides

    def state(self) -> dict[str, Any]:
        """What `Encoding.of` takes: plain values."""
        return {**vars(self), "shape": list(self.shape)}

    @staticmethod
    def of(state: dict[str, Any]) -> Encoding:
        """The encoding that a checkpoint holds."""
        return Encoding(**{**state, "shape": tuple(state["shape"])})


@dataclass(frozen=True)
class Rows:
    """Data as rows of categories.

    Attributes:
        parts: `train`, `valid` and `test`: `(rows, variables)` int64, -1 where a value is missing.
        encoding: What the categories mean.
        origin: Where each part comes from, a mapping a part with the same keys.
        told: What a run says on the command line about them, a line each.
    """

    parts: dict[str, Tensor]
    encoding: Encoding
    origin: tuple[dict[str, Any], ...]
    told: tuple[str, ...] = ()

    def table(self) -> list[dict[str, Any]]:
        """Where the rows come from and how many there are, a row a part."""
        return [
            {
                **told,
                "rows": len(self.parts[told["part"]]),
                "variables": self.encoding.variables,
                "categories": self.encoding.categories,
                "missing": int((self.parts[told["part"]] < 0).sum()),
            }
            for told in self.origin
        ]

    @property
    def sha256(self) -> str:
        """The hash of all rows and of what they mean."""
        digest = hashlib.sha256(json.dumps(self.encoding.state(), sort_keys=True).encode())
        for part in PARTS:
            digest.update(f"{part}{tuple(self.parts[part].shape)}".encode())
            digest.update(self.parts[part].numpy().data)
        return digest.hexdigest()


def rows_of(
    parts: Mapping[str, NDArray[np.integer]],
    encoding: Encoding,
    origin: Mapping[str, dict[str, Any]],
    told: Iterable[str] = (),
) -> Rows:
    """Rows of arrays, checked.

    Args:
        parts: By part, `(rows, variables)`.
        encoding: What they mean.
        origin: By part, where it comes from.
        told: What a run says about them.

    Raises:
        BadInput: A part is empty.
    """
    for part in PARTS:
        if len(parts[part]) == 0:
            raise BadInput(f"data: the {part} part is empty: use more data, shorter rows or another split")
    tensors = {part: torch.from_numpy(np.ascontiguousarray(parts[part], dtype=np.int64)) for part in PARTS}
    return Rows(tensors, encoding, tuple({"part": part, **origin[part]} for part in PARTS), tuple(told))


def windows(sequence: NDArray[np.integer], length: int) -> NDArray[np.integer]:
    """Windows that follow each other, `(windows, length)`; what is left at the end is left out."""
    count = len(sequence) // length
    return sequence[: count * length].reshape(count, length)


def evenly(rows: NDArray[np.integer], at_most: int) -> NDArray[np.integer]:
    """At most so many of the rows, evenly spaced; 0: all of them."""
    if at_most == 0 or len(rows) <= at_most:
        return rows
    return rows[np.arange(at_most) * len(rows) // at_most]
