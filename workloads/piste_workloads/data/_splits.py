"""Splits with the same share of every class in each part."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from piste_workloads.data._dataset import Arrays, Dataset, Meta, dataset


def hold_out(data: Dataset, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits examples in two; those of one class and group are held out together, or none of them is.

    Args:
        data: The examples.
        fraction: The share of the groups (without groups: of the examples) that is held out, in `[0, 1)`.
        seed: Of the draw.

    Returns:
        The indices of those that are kept and of those that are held out, ascending.
    """
    ranks = _ranks(data.y, data.group, seed)
    units, unit_of = np.unique(np.stack([ranks, data.y.numpy()]), axis=1, return_inverse=True)
    held = unit_of < round(fraction * units.shape[1])  # units are in the order of their ranks
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def some(data: Dataset, count: int, seed: int) -> Tensor:
    """The indices of `count` examples, ascending; the same share of every class and group, up to rounding."""
    strata = data.y if data.group is None else torch.stack([data.y, data.group])
    _, stratum = np.unique(strata.numpy().reshape(-1, len(data)), axis=1, return_inverse=True)
    order = _ranks(torch.from_numpy(stratum), None, seed).argsort(stable=True)
    return torch.from_numpy(np.sort(order[:count]))


def split_at_random(meta: Meta, arrays: Arrays, split: str | None, test: int, seed: int) -> Dataset:
    """One part of a data set that comes without a split.

    Args:
        meta: Where it comes from.
        arrays: All of it.
        split: `train`, `test`, or None for both.
        test: How many examples are to test on.
        seed: Of the draw.
    """
    whole = dataset(meta, arrays)
    if split is None:
        return whole
    chosen = torch.zeros(len(whole), dtype=torch.bool)
    chosen[some(whole, test, seed)] = True
    part = chosen if split == "test" else ~chosen
    return dataset(meta, {key: value[part.numpy()] for key, value in arrays.items()})


def _ranks(y: Tensor, group: Tensor | None, seed: int) -> NDArray[np.float64]:
    """Random ranks in (0, 1), `(n,)`, evenly spaced within each class; one rank for a class and group."""
    generator = np.random.default_rng(seed)
    labels = y.numpy()
    groups = np.arange(len(labels)) if group is None else group.numpy()
    ranks = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        units, unit_of = np.unique(groups[members], return_inverse=True)
        ranks[members] = (generator.permutation(len(units))[unit_of] + 0.5) / len(units)
    return ranks
