"""A circuit in the log domain, region by region, in float64: slow, but it neither under- nor overflows.

    leaf      l[n] = log table[n, x]                  (missing: 0)
    product   l[n] = sum_c l_c[n]
    sum       l[n] = log sum_c exp(log W[n, c] + l[c])
    flows     F[n, c] = F_n exp(log W[n, c] + l[c] - l[n]),   F_c = sum_n F[n, c],   F_root = 1

It is how the fast evaluations are defined, takes over the rows on which those are not sure, and gives
sampling and the most probable completion their values. The logarithm of zero is a number, `LOG_ZERO`, so that
no difference is undefined; a log-likelihood below `IMPOSSIBLE` is that of a row of probability zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from piste_algorithms.circuits.leaves import categories
from piste_algorithms.circuits.structure import Leaf, Product, Structure
from piste_algorithms.circuits.tables import moments, stacked

LOG_ZERO = -1e30
IMPOSSIBLE = -1e29

Reduction = Literal["sum", "max"]


def log_tables(structure: Structure, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacked float64 logarithms of weights and categories; normal densities as (mean, variance)."""
    found = {}
    for name, table in structure.tables.items():
        values = stacked(tables[name]).double()
        found[name] = values if table.kind == "gaussian" else values.log().clamp_min_(LOG_ZERO)
    return found


def region_values(
    structure: Structure, logs: Mapping[str, Tensor], x: Tensor, reduction: Reduction = "sum"
) -> list[Tensor]:
    """Values of every region, each `(batch, nodes)`.

    Args:
        structure: the circuit's structure.
        logs: from `log_tables`.
        x: `(batch, variables)`.
        reduction: `"sum"`, or `"max"` for the largest term of every sum, over states of missing variables
            too.
    """
    values: list[Tensor] = []
    for region in structure.regions:
        if isinstance(region, Leaf):
            values.append(_leaf_value(structure, logs, region, x[:, region.variable], reduction))
        elif isinstance(region, Product):
            total = values[region.children[0]]
            for child in region.children[1:]:
                total = total + values[child]
            values.append(total)
        else:
            weights = logs[region.table][region.index]
            below = torch.cat([values[child] for child in region.children], -1)
            if reduction == "max":
                values.append((weights + below[:, None, :]).amax(-1))
            else:
                values.append(log_matmul(weights, below))
    return values


def log_matmul(weights: Tensor, below: Tensor) -> Tensor:
    """`(batch, nodes)` log sum_c exp(weights[n, c] + below[b, c]), exact where the product underflows."""
    largest = below.amax(-1, keepdim=True)
    found = (below - largest).exp() @ weights.exp().T
    sure = found > 1e-280
    result = torch.where(sure, found, torch.ones_like(found)).log() + largest
    if not bool(sure.all()):
        row, node = torch.nonzero(~sure, as_tuple=True)
        pieces = zip(torch.split(row, 4096), torch.split(node, 4096), strict=True)
        exact = torch.cat([torch.logsumexp(weights[n] + below[b], -1) for b, n in pieces])
        result = result.index_put((row, node), exact)
    return result


def flows(structure: Structure, tables: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-likelihoods, -inf where p(x) = 0, and the statistics of the other rows, stacked, in float64."""
    logs = log_tables(structure, tables)
    values = region_values(structure, logs, x)
    root = values[-1][:, 0]
    possible = root > IMPOSSIBLE
    found: dict[str, Tensor] = {}
    for name, table in structure.tables.items():
        size = 3 if table.kind == "gaussian" else table.entries
        found[name] = root.new_zeros((table.matrices, table.nodes, size))
    flow: list[Tensor | None] = [None] * len(values)
    flow[-1] = possible.double()[:, None]
    for number in range(len(values) - 1, -1, -1):
        region, here = structure.regions[number], flow[number]
        assert here is not None
        if isinstance(region, Leaf):
            _add_leaf_flows(structure, tables, region, x[:, region.variable], here, found[region.table])
        elif isinstance(region, Product):
            for child in region.children:
                known = flow[child]
                flow[child] = here if known is None else known + here
        else:
            below = torch.cat([values[child] for child in region.children], -1)
            # F[n, c] = F_n exp(log W[n, c] + l[c] - l[n])
            edges = logs[region.table][region.index] + below[:, None, :] - values[number][..., None]
            edges = here[..., None] * edges.clamp_max(0.0).exp()
            found[region.table][region.index] += edges.sum(0)
            start = 0
            for child in region.children:
                part = edges[..., start : start + structure.widths[child]].sum(1)
                start += structure.widths[child]
                known = flow[child]
                flow[child] = part if known is None else known + part
        flow[number] = None
    return torch.where(possible, root, torch.full_like(root, -math.inf)), found


def _leaf_value(
    structure: Structure, logs: Mapping[str, Tensor], leaf: Leaf, column: Tensor, reduction: Reduction
) -> Tensor:
    parameters = logs[leaf.table][leaf.index]
    if structure.tables[leaf.table].kind == "gaussian":
        mean, variance = parameters.unbind(-1)
        missing = column.isnan()[:, None]
        # log N(x; m, s) = -((x - m)^2 / s + log(2 pi s)) / 2
        constant = -0.5 * (2 * math.pi * variance).log()
        density = constant - 0.5 * (column.double()[:, None] - mean).square() / variance
        return torch.where(missing, constant if reduction == "max" else torch.zeros_like(constant), density)
    observed = categories(column)
    found = parameters.T[observed.clamp_min(0)]
    absent = parameters.amax(-1) if reduction == "max" else parameters.new_zeros(parameters.shape[0])
    return torch.where((observed < 0)[:, None], absent, found)


def _add_leaf_flows(
    structure: Structure,
    tables: Mapping[str, Tensor],
    leaf: Leaf,
    column: Tensor,
    flow: Tensor,
    into: Tensor,
) -> None:
    description = structure.tables[leaf.table]
    expected = stacked(moments(description, tables[leaf.table]))[leaf.index].double()  # (nodes, entries)
    if description.kind == "gaussian":
        missing = column.isnan()
        value = column.double().nan_to_num()
        seen = torch.stack((torch.ones_like(value), value, value.square()), -1)
    else:
        observed = categories(column)
        missing = observed < 0
        seen = torch.nn.functional.one_hot(observed.clamp_min(0), description.entries).double()
    # F[n, .] += F_n(x) T(x), or F_n(x) E[T] where x is missing
    into[leaf.index] += (flow * ~missing[:, None]).T @ seen
    into[leaf.index] += (flow * missing[:, None]).sum(0)[:, None] * expected
