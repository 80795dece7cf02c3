"""Examples, and where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Meta:
    """Where examples come from; a result is shown with it.

    Attributes:
        name: The data set's name.
        source: The package, file, folder or hub repository.
        version: The package's version, or the archive's sha256.
        licence: As found at the source.
        real: Whether the task is one that others use; False for one made up from real pixels.
        note: What a reader of results ought to know.
        classes: The names of the labels, in their order.
        skipped: The members of an archive that could not be read and were left out.
        n: How many examples there are.
        sha256: The hash of the examples, `(x, y)`.
    """

    name: str
    source: str
    version: str
    licence: str
    real: bool
    note: str = ""
    classes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    n: int = 0
    sha256: str = ""

    def __str__(self) -> str:
        words = f"{self.name}: {self.n} examples of {self.source} {self.version[:12]}".rstrip()
        words += f", {len(self.skipped)} members skipped" if self.skipped else ""
        return f"{words} ({self.note})" if self.note else words


@dataclass(frozen=True)
class Dataset:
    """Examples with their labels.

    Attributes:
        x: Images, `(n, channels, height, width)` uint8.
        y: Labels, `(n,)` int64.
        meta: Where they come from.
        group: `(n,)` int64: examples of one group share content, so that a split keeps them together; None:
            no two do.
    """

    x: Tensor
    y: Tensor
    meta: Meta
    group: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)


Arrays = Mapping[str, NDArray[np.generic]]  # `x` and `y`, and where there are some `group`


def dataset(meta: Meta, arrays: Arrays) -> Dataset:
    """Makes a data set of arrays.

    Args:
        meta: All but `n` and `sha256`, which are found here.
        arrays: `x` `(n, channels, height, width)`, `y` `(n,)`, and where there are some `group` `(n,)`.
    """
    x, y = np.ascontiguousarray(arrays["x"], np.uint8), np.ascontiguousarray(arrays["y"], np.int64)
    digest = hashlib.sha256(f"{x.shape}{y.shape}".encode())
    digest.update(x.data)
    digest.update(y.data)
    group = torch.from_numpy(arrays["group"].astype(np.int64)) if "group" in arrays else None
    meta = replace(meta, n=len(y), sha256=digest.hexdigest())
    return Dataset(torch.from_numpy(x), torch.from_numpy(y), meta, group)
