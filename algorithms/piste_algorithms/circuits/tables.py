"""Parameter tables: how they lie in memory, their random start, and from expected statistics to parameters.

All learning rules work on *statistics* of a table, of its own shape but for normal densities:

    weights, categories   F[n, c] = sum_x dlog p(x) / dlog table[n, c]                    (nodes, entries)
    normal densities      sum_x F_n(x) (1, x, x^2)                                        (nodes, 3)

The *mass* of a node is F_n, the sum of its row, or the first entry; its *moments* are the statistics of mass
one that the parameters themselves stand for: the row, or (1, mean, mean^2 + variance).

Tables of categories lie category by category in memory (as `(..., categories, nodes)`), so that a batch reads
and writes whole rows; their public shape is `(..., nodes, categories)`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from piste_algorithms.circuits.structure import Structure, Table, region_of

# The least variance of a normal leaf: no row of data can make a density infinite.
MINIMUM_VARIANCE = 1e-6
# The largest one that gradients reach: a finite number in float32, and so are its moments.
MAXIMUM_VARIANCE = 1e30


def empty_table(table: Table, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """An uninitialised tensor of the table's shape, in its layout."""
    if table.kind == "categorical":
        swapped = (*table.shape[:-2], table.shape[-1], table.shape[-2])
        return torch.empty(swapped, dtype=dtype, device=device).transpose(-1, -2)
    return torch.empty(table.shape, dtype=dtype, device=device)


def empty_statistics(table: Table, like: Tensor) -> Tensor:
    """An uninitialised tensor for the statistics of a table."""
    if table.kind == "gaussian":
        return like.new_empty((*table.shape[:-1], 3))
    return empty_table(table, like.dtype, like.device)


def stacked(table: Tensor) -> Tensor:
    """A view `(matrices, nodes, entries)`."""
    while table.ndim < 3:
        table = table.unsqueeze(0)
    return table


def random_table(table: Table, generator: torch.Generator, dtype: torch.dtype, spread: float) -> Tensor:
    """A random start: rows exp(-spread U[0, 1]), normalised; normal densities of mean N(0, 1), variance 1."""
    parameters = empty_table(table, dtype, generator.device)
    if table.kind == "gaussian":
        parameters[..., 0] = torch.randn(
            table.shape[:-1], generator=generator, dtype=dtype, device=generator.device
        )
        parameters[..., 1] = 1.0
        return parameters
    drawn = torch.rand(table.shape, generator=generator, dtype=dtype, device=generator.device)
    parameters.copy_(drawn.mul_(-spread).exp_())
    return parameters.div_(parameters.sum(-1, keepdim=True))


def moments(table: Table, parameters: Tensor) -> Tensor:
    """Statistics of mass one that the parameters stand for; of a row that sums to one, the row itself."""
    if table.kind != "gaussian":
        return parameters
    mean, variance = parameters.unbind(-1)
    return torch.stack((torch.ones_like(mean), mean, mean.square() + variance), -1)


def mass(table: Table, statistics: Tensor) -> Tensor:
    """F_n of each node, `(..., nodes)`."""
    return statistics[..., 0] if table.kind == "gaussian" else statistics.sum(-1)


def from_statistics(
    table: Table, statistics: Tensor, parameters: Tensor, pseudocount: float, keep_zeros: bool = True
) -> Tensor:
    """Parameters of largest expected log-likelihood, with a pseudocount; overwrites `statistics`.

    A row is `(F + pseudocount / C) / (F_n + pseudocount)` over its C entries; with `keep_zeros` an entry of
    `parameters` that is zero stays so, gets no pseudocount and does not count in C. A normal density gets
    `pseudocount` observations of its own moments. A node of no mass keeps its parameters.

    Args:
        table: the table's description.
        statistics: see the module.
        parameters: the present parameters.
        pseudocount: at least 0.
        keep_zeros: see above.

    Returns:
        New parameters, rows sum to one; for weights and categories this is `statistics` itself.
    """
    floor = torch.finfo(statistics.dtype).tiny * max(table.entries, 4)
    if table.kind == "gaussian":
        statistics.add_(moments(table, parameters), alpha=pseudocount)
        count = statistics[..., :1]
        visited = count > floor
        found = statistics / torch.where(visited, count, torch.ones_like(count))
        return torch.where(visited, from_moments(table, found), parameters)
    if pseudocount > 0.0:
        if keep_zeros:
            support = parameters > 0
            share = pseudocount / support.sum(-1, keepdim=True).clamp_min(1)
            statistics.add_(support * share.to(statistics.dtype))
        else:
            statistics.add_(pseudocount / table.entries)
    # theta[n, c] <- (F[n, c] + pseudocount / C) / (F_n + pseudocount)
    total = statistics.sum(-1, keepdim=True)
    visited = total > floor
    statistics.div_(torch.where(visited, total, torch.ones_like(total)))
    if not bool(visited.all()):
        statistics.copy_(torch.where(visited, statistics, parameters))
    return statistics


def from_moments(table: Table, found: Tensor) -> Tensor:
    """Parameters that stand for these statistics of mass one; rows are normalised against rounding."""
    if table.kind != "gaussian":
        return found / found.sum(-1, keepdim=True)
    mean = found[..., 1]
    return torch.stack((mean, (found[..., 2] - mean.square()).clamp_min(MINIMUM_VARIANCE)), -1)


def check_parameters(structure: Structure, parameters: Mapping[str, Tensor]) -> None:
    """Raise `ValueError`, naming the table, row and region, unless these are parameters of the structure."""
    for name, tensor in parameters.items():
        table = structure.tables.get(name)
        if table is None:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(structure.tables)}")
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != table.shape:
            raise ValueError(f"{name} must be of shape {table.shape}, got {tuple(tensor.shape)}")
        if table.kind == "gaussian":
            broken = ~torch.isfinite(tensor).all(-1) | ~(tensor[..., 1] > 0)
            wants = "a finite mean and a positive variance"
        else:
            tolerance = 1e-6 if tensor.dtype == torch.float64 else 1e-5
            sums = tensor.double().sum(-1)
            broken = ~((sums - 1).abs() <= tolerance) | ~(tensor >= 0).all(-1)
            wants = f"numbers of at least 0 that sum to one (within {tolerance:g})"
        if bool(broken.any()):
            row = torch.nonzero(broken)[0].tolist() if broken.ndim else []
            region = region_of(structure, name, row[0] if len(row) == 2 else 0)
            where = (
                "" if region is None else f", node {row[-1] if row else 0} of {structure.describe(region)},"
            )
            values = tensor[tuple(row)].flatten()
            shown = ", ".join(f"{value:.6g}" for value in values[:8].tolist())
            raise ValueError(
                f"{name}{row or ''}{where} must be {wants}, got {shown}"
                f"{', ...' if len(values) > 8 else ''} with sum {float(values.double().sum()):.9g}"
            )
