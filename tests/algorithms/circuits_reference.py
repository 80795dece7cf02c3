"""Small circuits of every kind, and their definition node by node, for tests of circuits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from piste_algorithms.circuits import (
    Circuit,
    Leaf,
    Product,
    Structure,
    Sum,
    Table,
    hclt,
    hmm,
    pd,
    pdhclt,
)
from piste_algorithms.circuits.structure import Region


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def categorical_data(rows: int, variables: int, count: int, seed: int = 0) -> Tensor:
    """Categories with dependences: every variable repeats an earlier one half of the time."""
    draw = generator(seed)
    x = torch.randint(count, (rows, variables), generator=draw)
    for variable in range(1, variables):
        source = int(torch.randint(variable, (1,), generator=draw))
        copied = torch.rand(rows, generator=draw) < 0.5
        x[copied, variable] = x[copied, source]
    return x


def real_data(rows: int, variables: int, seed: int = 0) -> Tensor:
    draw = generator(seed)
    mixing = torch.randn(variables, variables, generator=draw, dtype=torch.float64)
    return torch.randn(rows, variables, generator=draw, dtype=torch.float64) @ mixing + 1.0


def tied_tree(dtype: torch.dtype = torch.float64) -> Circuit:
    """One matrix for all edges of a star, one table for all leaves: folds that share parameters."""
    leaves = [Leaf(variable, "emission") for variable in range(5)]
    edges = [Sum((variable,), "transition") for variable in range(1, 5)]
    regions: tuple[Region, ...] = (*leaves, *edges, Product((0, 5, 6, 7, 8)), Sum((9,), "initial"))
    tables = {
        "initial": Table((3,), "weights"),
        "transition": Table((3, 3), "weights"),
        "emission": Table((3, 2), "categorical"),
    }
    return randomised(Structure(regions, tables), dtype)


def shared_regions(dtype: torch.dtype = torch.float64) -> Circuit:
    """A leaf and a sum with two parents, widths that differ, categories that differ between variables."""
    regions = (
        Leaf(0, "left"),
        Leaf(1, "middle"),
        Leaf(2, "right"),
        Sum((1,), "widen", 0),
        Sum((1,), "widen", 1),
        Product((0, 3)),
        Product((0, 4)),
        Sum((5, 6), "mix"),
        Product((7, 2)),
        Sum((8,), "root"),
    )
    tables = {
        "left": Table((3, 2), "categorical"),
        "middle": Table((1, 2, 3), "categorical"),
        "right": Table((4, 2), "categorical"),
        "widen": Table((2, 3, 2), "weights"),
        "mix": Table((4, 6), "weights"),
        "root": Table((1, 4), "weights"),
    }
    return randomised(Structure(regions, tables), dtype)


def randomised(structure: Structure, dtype: torch.dtype) -> Circuit:
    draw = generator(9)
    parameters = {
        name: torch.rand(table.shape, generator=draw, dtype=torch.float64) + 0.05
        for name, table in structure.tables.items()
    }
    return Circuit(
        structure,
        {name: (value / value.sum(-1, keepdim=True)).to(dtype) for name, value in parameters.items()},
    )


double = torch.float64
DISCRETE: dict[str, Callable[[], Circuit]] = {
    "hmm": lambda: hmm(5, 3, 2, generator=generator(1), dtype=double),
    "hmm, a table a position": lambda: hmm(4, 3, 2, False, generator(2), double),
    "hmm of one position": lambda: hmm(1, 3, 4, generator=generator(3), dtype=double),
    "hclt": lambda: hclt(categorical_data(200, 6, 2), 3, dtype=double),
    "pd": lambda: pd((2, 3), 2, 2, split=1, dtype=double),
    "pd with random cuts": lambda: pd((7,), 2, 2, split=1, max_cuts=2, generator=generator(4), dtype=double),
    "pd with larger boxes": lambda: pd((3, 2), 2, 2, split=2, dtype=double),
    "pdhclt": lambda: pdhclt(categorical_data(200, 6, 2), (2, 3), 2, split=(1, 2), dtype=double),
    "tied tree": tied_tree,
    "shared regions": shared_regions,
}
REAL: dict[str, Callable[[], Circuit]] = {
    "hmm of real values": lambda: hmm(4, 3, None, generator=generator(5), dtype=double),
    "hclt of real values": lambda: hclt(real_data(100, 5), 3, dtype=double),
    "pdhclt of real values": lambda: pdhclt(real_data(100, 6), (6,), 2, split=2, dtype=double),
}


def everything(circuit: Circuit) -> Tensor:
    """All complete rows."""
    return torch.tensor(list(itertools.product(*(range(count) for count in circuit.structure.categories))))


def with_missing(x: Tensor, seed: int = 0, share: float = 0.4) -> Tensor:
    absent = torch.rand(x.shape, generator=generator(seed)) < share
    return x.masked_fill(absent, math.nan if x.is_floating_point() else -1)


def definition(structure: Structure, tables: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Log p(x) as the structure says it, one region and one row after the other, differentiable."""
    rows = []
    for row in x:
        values: list[Tensor] = []
        for region in structure.regions:
            if isinstance(region, Product):
                value = values[region.children[0]]
                for child in region.children[1:]:
                    value = value * values[child]
            else:
                table = tables[region.table]
                matrix = table[region.index] if table.ndim == 3 else table if table.ndim == 2 else table[None]
                if isinstance(region, Sum):
                    value = matrix @ torch.cat([values[child] for child in region.children])
                else:
                    value = _leaf(structure.tables[region.table].kind, matrix, row[region.variable])
            values.append(value)
        rows.append(values[-1][0].log())
    return torch.stack(rows)


def _leaf(kind: str, matrix: Tensor, seen: Tensor) -> Tensor:
    if kind == "gaussian":
        if bool(seen.isnan()):
            return torch.ones_like(matrix[:, 0])
        mean, variance = matrix.unbind(-1)
        return (-((seen - mean) ** 2) / (2 * variance)).exp() / (2 * math.pi * variance).sqrt()
    return matrix.sum(-1) if int(seen) < 0 else matrix[:, int(seen)]


def definition_flows(circuit: Circuit, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-likelihoods and theta dlog p / dtheta summed over rows, by autograd."""
    tables = {name: table.clone().requires_grad_() for name, table in circuit.parameters().items()}
    log_likelihood = definition(circuit.structure, tables, x)
    gradients = torch.autograd.grad(
        log_likelihood.sum(), list(tables.values()), allow_unused=True, materialize_grads=True
    )
    flows = {
        name: table.detach() * gradient
        for (name, table), gradient in zip(tables.items(), gradients, strict=True)
    }
    return log_likelihood.detach(), flows
