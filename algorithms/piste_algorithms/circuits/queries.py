"""Samples and most probable completions: a pass up in the log domain, then choices from the root down.

A sample at a node n of a sum moves to the child c with probability proportional to W[n, c] v_c(x); the most
probable completion to the child of the largest W[n, c] v_c(x), with v_c from the pass whose sums are maxima.
At a leaf a missing value is drawn, or the most probable one taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from piste_algorithms.circuits.leaves import categories
from piste_algorithms.circuits.log_domain import IMPOSSIBLE, log_tables, region_values
from piste_algorithms.circuits.structure import Leaf, Product, Structure

# Numbers that a piece of a batch may hold on the way up.
_PIECE_ENTRIES = 2**25

Choice = Callable[[Tensor], Tensor]  # logits (batch, entries) -> (batch,)


def sample(structure: Structure, tables: Mapping[str, Tensor], n: int, generator: torch.Generator) -> Tensor:
    """Ancestral samples, `(n, variables)`.

    Raises:
        ValueError: if `n` is below 1.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be a whole number of at least 1, got {n!r}")
    logs = log_tables(structure, tables)
    some = next(iter(tables.values()))
    missing = _missing(structure, some)
    # With nothing observed all samples have the same values on the way up.
    values = region_values(structure, logs, missing)
    rows = max(1, _PIECE_ENTRIES // sum(structure.widths))
    found = []
    for start in range(0, n, rows):
        size = min(rows, n - start)
        found.append(
            _descend(
                structure,
                logs,
                [value.expand(size, -1) for value in values],
                missing.repeat(size, 1),
                _drawing(generator),
                generator,
            )
        )
    return torch.cat(found)


def conditional_sample(
    structure: Structure, tables: Mapping[str, Tensor], x: Tensor, generator: torch.Generator
) -> Tensor:
    """Rows `(batch, variables)` with their missing values drawn given the observed ones.

    Raises:
        ValueError: if the observed part of a row has probability zero.
    """
    logs = log_tables(structure, tables)
    found = []
    rows = max(1, _PIECE_ENTRIES // sum(structure.widths))
    for start, part in zip(range(0, len(x), rows), torch.split(x, rows), strict=True):
        values = region_values(structure, logs, part)
        _check_possible(values[-1], start)
        found.append(_descend(structure, logs, values, part.clone(), _drawing(generator), generator))
    return torch.cat(found)


def most_probable(structure: Structure, tables: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Rows `(batch, variables)` completed by the most probable missing values and hidden states together.

    Raises:
        ValueError: if the observed part of a row has probability zero.
    """
    logs = log_tables(structure, tables)
    widest = max(table.nodes * table.entries for table in structure.tables.values())
    rows = max(1, _PIECE_ENTRIES // (sum(structure.widths) + widest))
    found = []
    for start, part in zip(range(0, len(x), rows), torch.split(x, rows), strict=True):
        values = region_values(structure, logs, part, "max")
        _check_possible(values[-1], start)
        found.append(_descend(structure, logs, values, part.clone(), lambda logits: logits.argmax(-1), None))
    return torch.cat(found)


def _missing(structure: Structure, like: Tensor) -> Tensor:
    """One row with nothing observed."""
    if structure.real_valued:
        return like.new_full((1, structure.variables), torch.nan)
    return like.new_full((1, structure.variables), -1, dtype=torch.int64)


def _check_possible(root: Tensor, start: int) -> None:
    impossible = root[:, 0] < IMPOSSIBLE
    if bool(impossible.any()):
        row = start + int(torch.nonzero(impossible)[0, 0])
        raise ValueError(f"x[{row}]: the observed part of this row has probability zero under the circuit")


def _drawing(generator: torch.Generator) -> Choice:
    def draw(logits: Tensor) -> Tensor:
        # argmax_c (logits_c - log E_c), with E_c ~ Exp(1), is a draw from softmax(logits)
        noise = torch.empty_like(logits).exponential_(generator=generator)
        return (logits - noise.log()).argmax(-1)

    return draw


def _descend(
    structure: Structure,
    logs: Mapping[str, Tensor],
    values: list[Tensor],
    x: Tensor,
    choose: Choice,
    generator: torch.Generator | None,
) -> Tensor:
    """Complete `x` in place from the root down; without a generator a normal leaf gives its mean."""
    # The node at which a row is in each region; -1: the row does not pass through it.
    nodes = [x.new_full((len(x),), -1, dtype=torch.int64) for _ in structure.regions]
    nodes[-1].zero_()
    for number in range(len(structure.regions) - 1, -1, -1):
        region, here = structure.regions[number], nodes[number]
        visited = here >= 0
        if isinstance(region, Product):
            for child in region.children:
                nodes[child] = torch.where(visited, here, nodes[child])
        elif isinstance(region, Leaf):
            _complete(structure, logs, region, here, visited, x, choose, generator)
        else:
            below = torch.cat([values[child] for child in region.children], -1)
            chosen = choose(logs[region.table][region.index][here.clamp_min(0)] + below)
            start = 0
            for child in region.children:
                stop = start + structure.widths[child]
                inside = visited & (chosen >= start) & (chosen < stop)
                nodes[child] = torch.where(inside, chosen - start, nodes[child])
                start = stop
    return x


def _complete(
    structure: Structure,
    logs: Mapping[str, Tensor],
    leaf: Leaf,
    here: Tensor,
    visited: Tensor,
    x: Tensor,
    choose: Choice,
    generator: torch.Generator | None,
) -> None:
    column = x[:, leaf.variable]
    parameters = logs[leaf.table][leaf.index][here.clamp_min(0)]
    if structure.tables[leaf.table].kind == "gaussian":
        mean, variance = parameters.unbind(-1)
        drawn = mean
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
            drawn = mean + variance.sqrt() * noise
        wanted = visited & column.isnan()
    else:
        drawn = choose(parameters)
        wanted = visited & (categories(column) < 0)
    x[:, leaf.variable] = torch.where(wanted, drawn.to(x.dtype), column)
