"""Chow-Liu trees: the tree of pairwise dependences that is closest to the data.

    I(i, j) = sum_{a, b} p(a, b) log(p(a, b) / (p(a) p(b)))           categories, p the empirical distribution
    I(i, j) = -log(1 - r_ij^2) / 2                                     real values, r the correlation

The tree is a maximum spanning tree of I, its root the middle of its longest path, so that it is as shallow as
it can be. Source: Chow and Liu, "Approximating discrete probability distributions with dependence trees"
(1968).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from piste_algorithms._checks import check_integer

# Entries of a block of joint counts: rows of variables are taken together up to so many.
_BLOCK_ENTRIES = 2**24


def mutual_information(data: Tensor, num_categories: int | None = None, bins: int | None = None) -> Tensor:
    """Empirical mutual information of every pair of variables, in nats.

    Of a pair, the rows count in which neither value is missing.

    Args:
        data: `(samples, variables)`, whole numbers with -1 where missing, or floating-point with NaN.
        num_categories: of all variables; None: the largest value and one.
        bins: so many equal ranges of categories stand for the categories; None: every category by itself.
            Then the information is that of the ranges.

    Returns:
        `(variables, variables)` float64, symmetric, the diagonal zero.

    Raises:
        ValueError: if an argument is outside its range.
    """
    count = check_data(data, num_categories)
    if count is None:
        return _of_real_values(data.double())
    if bins is not None:
        check_integer("bins", bins, low=2)
        if bins < count:
            data = torch.where(data < 0, data, torch.div(data * bins, count, rounding_mode="floor"))
            count = bins
    # A table of the pairs of categories, or, where it would be emptier than not, the pairs that there are.
    return _of_categories(data, count) if count**2 <= len(data) else _of_many_categories(data, count)


def chow_liu_tree(data: Tensor, num_categories: int | None = None, bins: int | None = None) -> list[int]:
    """The parent of each variable in the Chow-Liu tree, -1 for the root.

    Args:
        data: see `mutual_information`, as are the others.
        num_categories: see `mutual_information`.
        bins: see `mutual_information`.

    Raises:
        ValueError: as `mutual_information`.
    """
    return spanning_tree(mutual_information(data, num_categories, bins))


def spanning_tree(weights: Tensor) -> list[int]:
    """Parents in a maximum spanning tree of `(vertices, vertices)` weights, -1 for its center."""
    matrix: NDArray[np.float64] = weights.double().cpu().numpy()
    size = len(matrix)
    # Prim: the vertex that is tied strongest to the tree joins it.
    best, nearest = matrix[0].copy(), np.zeros(size, dtype=np.int64)
    inside = np.zeros(size, dtype=bool)
    inside[0] = True
    neighbours: list[list[int]] = [[] for _ in range(size)]
    for _ in range(size - 1):
        joined = int(np.where(inside, -np.inf, best).argmax())
        tied = int(nearest[joined])
        neighbours[joined].append(tied)
        neighbours[tied].append(joined)
        inside[joined] = True
        closer = matrix[joined] > best
        best[closer] = matrix[joined][closer]
        nearest[closer] = joined
    one_end, _ = _farthest(neighbours, 0)
    other_end, back = _farthest(neighbours, one_end)
    path = [other_end]
    while path[-1] != one_end:
        path.append(back[path[-1]])
    _, parents = _farthest(neighbours, path[len(path) // 2])
    return parents


def of_edges(information: Tensor, parents: Sequence[int]) -> list[float]:
    """The information between each vertex and its parent in nats, 0 for a root."""
    return [float(information[child, parent]) if parent >= 0 else 0.0 for child, parent in enumerate(parents)]


def check_data(data: Tensor, num_categories: int | None) -> int | None:
    """The number of categories of data, None for real values.

    Raises:
        ValueError: if `data` is no matrix of whole or floating-point numbers with a row, or a value is
            outside.
    """
    if not isinstance(data, Tensor) or data.ndim != 2 or 0 in data.shape or data.dtype == torch.bool:
        found = f"{tuple(data.shape)} {data.dtype}" if isinstance(data, Tensor) else type(data).__name__
        raise ValueError(f"data must be a tensor (samples, variables) of numbers, got {found}")
    if data.is_floating_point():
        if num_categories is not None:
            raise ValueError(
                f"num_categories must be None for real values ({data.dtype}), got {num_categories}"
            )
        if bool(data.isinf().any()):
            raise ValueError("data must be finite or missing (NaN), got an infinite value")
        return None
    count = max(1, int(data.max()) + 1) if num_categories is None else num_categories
    check_integer("num_categories", count, low=1)
    broken = (data < -1) | (data >= count)
    if bool(broken.any()):
        row, column = torch.nonzero(broken)[0].tolist()
        raise ValueError(
            f"data[{row}, {column}] (row, column) must be from 0 to {count - 1}, or -1 where missing, got "
            f"{int(data[row, column])}"
        )
    return count


def _farthest(neighbours: list[list[int]], start: int) -> tuple[int, list[int]]:
    """A vertex that is most edges away from `start`, and the next vertex on the way back of each one."""
    back = [-2] * len(neighbours)
    back[start] = -1
    reached = [start]
    for vertex in reached:
        for other in neighbours[vertex]:
            if back[other] == -2:
                back[other] = vertex
                reached.append(other)
    return reached[-1], back


def _of_categories(data: Tensor, count: int) -> Tensor:
    variables = data.shape[1]
    found = torch.zeros((variables, variables), dtype=torch.float64)
    block = max(1, min(variables, _BLOCK_ENTRIES // (count * count * variables)))
    rows = max(1, _BLOCK_ENTRIES // (variables * count))
    for start in range(0, variables, block):
        stop = min(start + block, variables)
        joint = torch.zeros(((stop - start) * count, variables * count), dtype=torch.float64)
        for part in torch.split(data.cpu(), rows):
            seen = torch.nn.functional.one_hot(part.long() + 1, count + 1)[..., 1:].float()
            # Counts of a part of the rows are whole numbers below 2^24, exact in float32.
            left = seen[:, start:stop].reshape(len(part), -1)
            joint += left.T @ seen.reshape(len(part), -1)
        counts = joint.view(stop - start, count, variables, count).permute(0, 2, 1, 3)
        p = counts / counts.sum((2, 3), keepdim=True).clamp_min(1.0)
        independent = p.sum(3, keepdim=True) * p.sum(2, keepdim=True)
        # I = sum p log(p / (p_a p_b)), with 0 log 0 = 0
        ratio = torch.where(
            p > 0, p / torch.where(p > 0, independent, torch.ones_like(p)), torch.ones_like(p)
        )
        found[start:stop] = (p * ratio.log()).sum((2, 3))
    found.fill_diagonal_(0.0)
    return (found + found.T).div_(2).clamp_min_(0.0)


def _of_many_categories(data: Tensor, count: int) -> Tensor:
    columns: NDArray[np.int64] = data.long().T.contiguous().cpu().numpy()
    there = columns >= 0
    alone = _n_log_n(columns)
    found = np.zeros((len(columns), len(columns)))
    for i in range(len(columns) - 1):
        rest = columns[i + 1 :]
        both = there[i] & there[i + 1 :]
        one, other = alone[i], alone[i + 1 :]
        if not both.all():
            one, other = (_n_log_n(np.where(both, values, -1)) for values in (columns[i], rest))
        pairs = _n_log_n(np.where(both, columns[i] * count + rest, -1))
        # I = log n - (sum_a n_a log n_a + sum_b n_b log n_b - sum_{a, b} n_ab log n_ab) / n
        n = np.maximum(both.sum(1), 1)
        found[i, i + 1 :] = np.log(n) - (one + other - pairs) / n
    return torch.from_numpy(found + found.T).clamp_min_(0.0)


def _n_log_n(values: NDArray[np.int64]) -> NDArray[np.float64]:
    """The sum of n log n over the counts n of each row's values, -1 left out, `(rows,)`."""
    ordered = np.sort(values, 1)
    begins = np.ones(ordered.shape, dtype=bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    counts = np.diff(starts, append=ordered.size).astype(np.float64)
    terms = np.where(ordered.ravel()[starts] >= 0, counts * np.log(counts), 0.0)
    return np.bincount(starts // ordered.shape[1], terms, len(ordered)).astype(np.float64)


def _of_real_values(data: Tensor) -> Tensor:
    there = (~data.isnan()).double()
    spread = torch.where(there > 0, data - torch.nanmean(data, 0), torch.zeros_like(data)).nan_to_num_()
    count = (there.T @ there).clamp_min(1.0)
    # Moments of pairs, over the rows in which both are there: entry (i, j) of `mean` is the mean of i.
    mean = spread.T @ there / count
    square = spread.square().T @ there / count - mean.square()
    covariance = spread.T @ spread / count - mean * mean.T
    scale = (square * square.T).clamp_min_(0.0).sqrt_()
    correlation = torch.where(scale > 0, covariance / scale.clamp_min(1e-300), torch.zeros_like(scale))
    # I = -log(1 - r^2) / 2
    found = -0.5 * torch.log1p(-correlation.square().clamp_max(1 - 1e-12))
    return found.fill_diagonal_(0.0).cpu()
