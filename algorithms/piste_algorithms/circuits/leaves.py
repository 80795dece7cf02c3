"""Leaves of one table on a batch: their values, and the sums of their flows.

Regions r = 0, 1, ... of a batch share a table `(matrices, nodes, entries)`; region r reads
`table[indices[r]]` at the variable `variables[r]`. A missing value sums its variable out: every node has the
value 1, and its flow is spread as the table spreads it. Values are `(regions, batch, nodes)` times exp(scale)
`(regions, batch)`.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from piste_algorithms.circuits.structure import Table
from piste_algorithms.circuits.tables import moments, stacked


def categories(x: Tensor) -> Tensor:
    """Categories as int64, -1 where missing, of columns that may be floating-point with NaN for missing."""
    return x.nan_to_num(nan=-1.0).long() if x.is_floating_point() else x


class Leaves(Protocol):
    """Leaf regions of one table on one batch."""

    def values(self, start: int, stop: int) -> Tensor:
        """Values of the regions `start:stop`, `(stop - start, batch, nodes)`."""

    def log_values(self, start: int, stop: int) -> Tensor:
        """Logarithms of values and scale together."""

    def scale(self, start: int, stop: int) -> Tensor | None:
        """Their logarithmic scale `(stop - start, batch)`; None: zero."""

    def add_flows(self, start: int, stop: int, flows: Tensor) -> None:
        """Add flows `(stop - start, batch, nodes)` to the statistics; `flows` is overwritten."""

    def finish(self) -> None:
        """Add what missing values have gathered."""


class CategoricalLeaves:
    """Leaves with a probability for each category."""

    def __init__(
        self, table: Tensor, indices: Tensor, variables: Tensor, x: Tensor, statistics: Tensor | None
    ) -> None:
        parameters = stacked(table)
        self.nodes, self.entries = parameters.shape[1:]
        self.parameters = parameters
        self.indices = indices
        # One row of nodes a category: (matrices * entries, nodes), a view in the layout of `empty_table`.
        self.rows = parameters.transpose(1, 2).reshape(-1, self.nodes)
        observed = categories(x[:, variables].T)  # (regions, batch)
        self.missing = observed < 0
        self.any_missing: list[bool] = self.missing.any(-1).tolist()
        self.positions = observed.clamp_min(0).add_(indices[:, None] * self.entries)
        self.statistics = None if statistics is None else stacked(statistics)
        self.unseen: Tensor | None = None  # flows of missing values, (matrices, nodes)

    def values(self, start: int, stop: int) -> Tensor:
        """p(x_variable | node), or 1 where it is missing."""
        found = self.rows.index_select(0, self.positions[start:stop].flatten())
        found = found.view(stop - start, -1, self.nodes)
        if any(self.any_missing[start:stop]):
            found.masked_fill_(self.missing[start:stop, :, None], 1.0)
        return found

    def log_values(self, start: int, stop: int) -> Tensor:
        """Logarithms of `values`."""
        return self.values(start, stop).log_()

    def scale(self, start: int, stop: int) -> None:
        """No scale: probabilities are at most 1."""

    def add_flows(self, start: int, stop: int, flows: Tensor) -> None:
        """F[n, x_variable] += F_n(x)."""
        assert self.statistics is not None
        if any(self.any_missing[start:stop]):
            missing = self.missing[start:stop, :, None]
            if self.unseen is None:
                self.unseen = flows.new_zeros((self.statistics.shape[0], self.nodes))
            self.unseen.index_add_(0, self.indices[start:stop], (flows * missing).sum(1))
            flows.masked_fill_(missing, 0.0)
        rows = self.statistics.transpose(1, 2).view(-1, self.nodes)
        rows.index_add_(0, self.positions[start:stop].flatten(), flows.reshape(-1, self.nodes))

    def finish(self) -> None:
        """F[n, c] += F_n(missing) table[n, c]."""
        if self.unseen is not None:
            assert self.statistics is not None
            self.statistics.addcmul_(self.unseen[..., None], self.parameters)


class GaussianLeaves:
    """Leaves with a normal density."""

    def __init__(
        self,
        table: Tensor,
        indices: Tensor,
        variables: Tensor,
        x: Tensor,
        statistics: Tensor | None,
        description: Table,
    ) -> None:
        parameters = stacked(table)
        self.mean, self.variance = parameters[indices].unbind(-1)  # (regions, nodes)
        self.moments = stacked(moments(description, table))[indices]
        self.x = x[:, variables].T  # (regions, batch)
        self.missing = self.x.isnan()
        self.indices = indices
        self.statistics = None if statistics is None else stacked(statistics)

    def log_values(self, start: int, stop: int) -> Tensor:
        """Log densities, 0 where the value is missing."""
        variance = self.variance[start:stop, None, :]
        # log N(x; m, s) = -((x - m)^2 / s + log(2 pi s)) / 2
        square = (self.x[start:stop, :, None] - self.mean[start:stop, None, :]).square() / variance
        found = (square + (2 * math.pi * variance).log()) * -0.5
        return found.masked_fill(self.missing[start:stop, :, None], 0.0)

    def values(self, start: int, stop: int) -> Tensor:
        """Densities, the largest of a region 1."""
        found = self.log_values(start, stop)
        return (found - found.amax(-1, keepdim=True)).exp_()

    def scale(self, start: int, stop: int) -> Tensor:
        """Logarithm of the largest density of a region."""
        return self.log_values(start, stop).amax(-1)

    def add_flows(self, start: int, stop: int, flows: Tensor) -> None:
        """F_n (1, x, x^2) where x is there, and F_n times the node's moments where it is missing."""
        assert self.statistics is not None
        missing = self.missing[start:stop]
        x = self.x[start:stop].nan_to_num()
        powers = torch.stack((torch.ones_like(x), x, x.square()), -1)  # (regions, batch, 3)
        seen = flows * ~missing[..., None]
        found = seen.transpose(1, 2) @ powers
        found += (flows - seen).sum(1)[..., None] * self.moments[start:stop]
        self.statistics.index_add_(0, self.indices[start:stop], found)

    def finish(self) -> None:
        """Nothing is left to add."""


def make_leaves(
    description: Table,
    table: Tensor,
    indices: Tensor,
    variables: Tensor,
    x: Tensor,
    statistics: Tensor | None = None,
) -> Leaves:
    """Leaf regions of one table on a batch.

    Args:
        description: the table's description.
        table: its parameters.
        indices: `(regions,)`, the matrix of each region.
        variables: `(regions,)`, the variable of each region.
        x: `(batch, variables)`.
        statistics: what `add_flows` adds to; None where only values are wanted.
    """
    if description.kind == "gaussian":
        return GaussianLeaves(table, indices, variables, x.to(table.dtype), statistics, description)
    return CategoricalLeaves(table, indices, variables, x, statistics)
