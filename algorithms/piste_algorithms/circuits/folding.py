"""Folding: regions of one depth and one shape become one operation on stacked tensors.

Values of regions of one width share a buffer `(rows, batch, width)`; a fold writes consecutive rows of it.
Flows have a buffer of their own, in which a region with a product as its only parent has no row: its flow is
that of the product.

Between products without a sum the ratios of a vector's entries have no bound, so a product of nothing but
leaves is *logarithmic*: it is a sum of logarithms, kept in a third buffer for products above it and turned
into values for sums. A leaf that has only such parents is kept as a logarithm.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from piste_algorithms.circuits.structure import Leaf, Product, Structure, Sum, children_of

Rows = slice | Tensor
# How a logarithmic product finds a child: as values, as logarithms among the values, or in the buffer of
# logarithms.
Form = Literal["values", "logarithms", "buffer"]


@dataclass(frozen=True)
class Gather:
    """One child of every region of a fold, where its values and its flow are."""

    width: int
    values: Rows  # rows in the buffer of values of that width, or of logarithms where the form says so
    form: Form  # of the children of a logarithmic product
    regions: Tensor  # (regions,) numbers of the children themselves
    owners: Tensor  # those regions of the fold whose child does not share their row of flows
    flows: Tensor  # (owners,) the rows of these children in the buffer of flows of that width


@dataclass(frozen=True)
class Fold:
    """Regions that are evaluated at once."""

    kind: str  # "leaf", "product" or "sum"
    regions: Tensor  # (regions,) their numbers
    width: int
    start: int  # first row in the buffer of values of that width
    flows: Rows  # rows in the buffer of flows of that width
    table: str  # "" for a product
    indices: Rows  # matrices of the table
    leaf_indices: Tensor  # the same as numbers, (regions,)
    variables: Tensor  # of leaves, (regions,); empty elsewhere
    children: tuple[Gather, ...]
    logarithmic: bool  # a product of leaves, or a leaf of such products alone
    log_start: int  # first row of a logarithmic product in the buffer of logarithms

    @property
    def stop(self) -> int:
        """One past its last row."""
        return self.start + len(self.regions)


@dataclass(frozen=True)
class Folding:
    """All folds of a circuit, children first, and the sizes of the buffers by width."""

    folds: tuple[Fold, ...]
    value_rows: dict[int, int]
    flow_rows: dict[int, int]
    log_rows: dict[int, int]


def fold(structure: Structure, device: torch.device) -> Folding:
    """Group the regions; a table whose matrices are numbered along the folds is used in place."""
    forms = _forms(structure)
    groups: dict[tuple[Hashable, ...], list[int]] = {}
    levels: list[int] = []
    for number, region in enumerate(structure.regions):
        level = 1 + max((levels[child] for child in children_of(region)), default=-1)
        levels.append(level)
        groups.setdefault(_signature(structure, number, level, forms), []).append(number)

    flow_row, flow_rows = _flow_rows(structure)
    value_row: dict[int, int] = {}
    log_row: dict[int, int] = {}
    value_rows: dict[int, int] = {}
    log_rows: dict[int, int] = {}
    folds = []
    for key in sorted(groups, key=lambda key: (key[0], str(key))):
        members = sorted(groups[key], key=lambda number: (_index(structure, number), number))
        first = structure.regions[members[0]]
        width = structure.widths[members[0]]
        start = value_rows.setdefault(width, 0)
        value_rows[width] += len(members)
        value_row.update({number: start + offset for offset, number in enumerate(members)})
        form = forms[members[0]]
        log_start = log_rows.setdefault(width, 0) if form == "buffer" else 0
        if form == "buffer":
            log_rows[width] += len(members)
            log_row.update({number: log_start + offset for offset, number in enumerate(members)})
        children = []
        for place in range(len(children_of(first))):
            below = [children_of(structure.regions[number])[place] for number in members]
            at = log_row if form == "buffer" and forms[below[0]] == "buffer" else value_row
            children.append(_gather(structure, below, forms[below[0]], at, flow_row, device))
        indices = [_index(structure, number) for number in members]
        variables = [
            region.variable
            for region in (structure.regions[number] for number in members)
            if isinstance(region, Leaf)
        ]
        folds.append(
            Fold(
                kind="leaf"
                if isinstance(first, Leaf)
                else "product"
                if isinstance(first, Product)
                else "sum",
                regions=torch.tensor(members, device=device),
                width=width,
                start=start,
                flows=rows([flow_row[number] for number in members], device),
                table="" if isinstance(first, Product) else first.table,
                indices=rows(indices, device),
                variables=torch.tensor(variables, dtype=torch.int64, device=device),
                leaf_indices=torch.tensor(indices, device=device),
                children=tuple(children),
                logarithmic=form != "values",
                log_start=log_start,
            )
        )
    return Folding(tuple(folds), value_rows, flow_rows, log_rows)


def rows(numbers: Sequence[int], device: torch.device) -> Rows:
    """A slice where the numbers are consecutive, which takes no copy, and a tensor elsewhere."""
    if list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    return torch.tensor(numbers, device=device)


def take(buffer: Tensor, at: Rows) -> Tensor:
    """Rows of a buffer: a view for a slice, a copy for numbers."""
    return buffer[at] if isinstance(at, slice) else buffer.index_select(0, at)


def _forms(structure: Structure) -> list[Form]:
    """How each region is kept: products of leaves alone as logarithms in a buffer, and their leaves so."""
    forms: list[Form] = []
    only_leaves: list[bool] = []
    for region in structure.regions:
        only_leaves.append(
            not isinstance(region, Sum) and all(only_leaves[child] for child in children_of(region))
        )
        forms.append("buffer" if isinstance(region, Product) and only_leaves[-1] else "values")
    for number, region in enumerate(structure.regions):
        if isinstance(region, Leaf) and all(
            forms[parent] == "buffer" for parent in structure.parents[number]
        ):
            forms[number] = "logarithms"
    return forms


def _signature(structure: Structure, number: int, level: int, forms: Sequence[Form]) -> tuple[Hashable, ...]:
    """What regions of a fold have in common: the level first."""
    region = structure.regions[number]
    widths = tuple(structure.widths[child] for child in children_of(region))
    if isinstance(region, Product):
        below = tuple(forms[child] for child in region.children) if forms[number] == "buffer" else ()
        return (level, "product", widths, forms[number], below)
    return (level, "sum" if isinstance(region, Sum) else "leaf", region.table, widths, forms[number])


def _index(structure: Structure, number: int) -> int:
    region = structure.regions[number]
    return 0 if isinstance(region, Product) else region.index


def _flow_rows(structure: Structure) -> tuple[list[int], dict[int, int]]:
    """The row of every region's flow, and how many there are of each width."""
    found = [0] * len(structure.regions)
    counts: dict[int, int] = {}
    for number in range(len(structure.regions) - 1, -1, -1):
        if _shares_flow(structure, number):
            found[number] = found[structure.parents[number][0]]
        else:
            width = structure.widths[number]
            found[number] = counts.setdefault(width, 0)
            counts[width] += 1
    return found, counts


def _shares_flow(structure: Structure, number: int) -> bool:
    parents = structure.parents[number]
    return len(parents) == 1 and isinstance(structure.regions[parents[0]], Product)


def _gather(
    structure: Structure,
    children: Sequence[int],
    form: Form,
    row: Mapping[int, int],
    flow_row: Sequence[int],
    device: torch.device,
) -> Gather:
    owners = [offset for offset, child in enumerate(children) if not _shares_flow(structure, child)]
    flows = [flow_row[children[offset]] for offset in owners]
    return Gather(
        width=structure.widths[children[0]],
        values=rows([row[child] for child in children], device),
        form=form,
        regions=torch.tensor(children, device=device),
        owners=torch.tensor(owners, dtype=torch.int64, device=device),
        flows=torch.tensor(flows, dtype=torch.int64, device=device),
    )
