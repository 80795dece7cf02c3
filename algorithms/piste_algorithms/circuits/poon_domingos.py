"""Poon-Domingos circuits of arrays: every box of a grid is a mixture over the ways to cut it in two.

A variable is a cell of an array. Cuts lie at the multiples of `split`; a box that can be cut has
`num_latents` nodes, each a mixture of the products of the two parts of every cut (node k with node k), and
shares its parts with other boxes. A box that cannot be cut is a product of independent leaves (`pd`), or a
hidden Chow-Liu tree with as many roots (`pdhclt`).

Sources: Poon and Domingos, "Sum-product networks: a new deep architecture" (2011); with trees at the bottom
as in Liu et al., "Rethinking probabilistic circuit parameter learning" (2025).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from piste_algorithms._checks import check_integer
from piste_algorithms.circuits.chow_liu import check_data, mutual_information, of_edges, spanning_tree
from piste_algorithms.circuits.circuit import Circuit
from piste_algorithms.circuits.hclt import add_forest, forest_tables, random_circuit
from piste_algorithms.circuits.structure import Leaf, Product, Region, Structure, Sum, Table

Box = tuple[tuple[int, int], ...]  # (start, stop) on each axis


def pd(
    shape: Sequence[int],
    num_latents: int,
    num_categories: int | None,
    split: int | Sequence[int] | None = None,
    max_cuts: int = 4,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.0,
) -> Circuit:
    """A Poon-Domingos circuit over an array, its variables in row-major order, with random parameters.

    Args:
        shape: sides of the array, such as `(28, 28)` or `(1167,)`.
        num_latents: nodes of a box.
        num_categories: categories of a variable, or None for real values with normal densities.
        split: side of the smallest boxes, one for all axes or one each; None: a quarter of each side, rounded
            up.
        max_cuts: ways to cut a box that are used, drawn where there are more.
        generator: draws cuts and parameters; None: one of seed 0.
        dtype: float32 or float64.
        spread: rows of the tables are exp(-spread U[0, 1]), normalised.

    Returns:
        A circuit with the tables `emission` (variables, num_latents, num_categories), `mixture_m` for the
        boxes with m cuts, (boxes, num_latents, m num_latents), and `initial`, the root's.

    Raises:
        ValueError: if an argument is outside its range.
    """
    if num_categories is not None:
        check_integer("num_categories", num_categories, low=1)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    grid = _Grid(shape, num_latents, split, max_cuts, generator)
    regions: list[Region] = []
    bottoms = {}
    variables = math.prod(grid.shape)
    regions.extend(Leaf(variable, "emission", variable) for variable in range(variables))
    for box in grid.smallest:
        cells = grid.cells(box)
        if len(cells) == 1:
            bottoms[box] = cells[0]
        else:
            regions.append(Product(tuple(cells)))
            bottoms[box] = len(regions) - 1
    tables = forest_tables([-1] * variables, num_latents, num_categories)
    tables.update(grid.add_boxes(regions, bottoms))
    description = {"builder": "pd", "shape": list(grid.shape)}
    return random_circuit(Structure(tuple(regions), tables, description), generator, dtype, spread)


def pdhclt(
    data: Tensor,
    shape: Sequence[int],
    num_latents: int,
    num_categories: int | None = None,
    split: int | Sequence[int] | None = None,
    max_cuts: int = 4,
    bins: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.0,
) -> Circuit:
    """A Poon-Domingos circuit whose smallest boxes are hidden Chow-Liu trees learnt from data.

    Args:
        data: `(samples, variables)`, rows are arrays of `shape` in row-major order; see `hclt`.
        shape: see `pd`, as are `num_latents`, `split`, `max_cuts`, `dtype` and `spread`.
        num_latents: nodes of a box, and states of every latent variable.
        num_categories: of all variables; None: the largest value in the data and one, or real values.
        split: see `pd`.
        max_cuts: see `pd`.
        bins: see `hclt`.
        generator: draws cuts and parameters; None: one of seed 0.
        dtype: see `pd`.
        spread: see `pd`.

    Returns:
        A circuit with the tables of `pd`, `transition` (edges, num_latents, num_latents) of the trees, and
        `bottom` (trees, num_latents, num_latents), the weights of the trees' roots;
        `structure.description["parents"]` is the forest, `["information"]` as in `hclt`.

    Raises:
        ValueError: if an argument is outside its range.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    grid = _Grid(shape, num_latents, split, max_cuts, generator)
    count = check_data(data, num_categories)
    if data.shape[1] != math.prod(grid.shape):
        raise ValueError(
            f"data must have {math.prod(grid.shape)} columns for the shape {grid.shape}, got {data.shape[1]}"
        )
    parents, edges = [-1] * data.shape[1], [0.0] * data.shape[1]
    for box in grid.smallest:
        cells = grid.cells(box)
        information = mutual_information(data[:, cells], count, bins)
        tree = spanning_tree(information)
        for cell, parent, edge in zip(cells, tree, of_edges(information, tree), strict=True):
            parents[cell], edges[cell] = -1 if parent < 0 else cells[parent], edge
    regions: list[Region] = []
    roots = add_forest(regions, parents)
    bottoms: dict[Box, int] = {}
    tables = forest_tables(parents, num_latents, count)
    # Trees in the order of their roots' regions, so that a fold's matrices lie side by side.
    boxes = {cell: box for box in grid.smallest for cell in grid.cells(box)}
    for number, (root, node) in enumerate(sorted(roots.items(), key=lambda item: item[1])):
        regions.append(Sum((node,), "bottom", number))
        bottoms[boxes[root]] = len(regions) - 1
    tables["bottom"] = Table((len(roots), num_latents, num_latents), "weights")
    tables.update(grid.add_boxes(regions, bottoms))
    description = {"builder": "pdhclt", "shape": list(grid.shape), "parents": parents, "information": edges}
    return random_circuit(Structure(tuple(regions), tables, description), generator, dtype, spread, data)


class _Grid:
    """Boxes of an array, and the cuts that are used."""

    def __init__(
        self,
        shape: Sequence[int],
        num_latents: int,
        split: int | Sequence[int] | None,
        max_cuts: int,
        generator: torch.Generator,
    ) -> None:
        check_integer("num_latents", num_latents, low=1)
        check_integer("max_cuts", max_cuts, low=1)
        self.shape = tuple(shape)
        if not self.shape:
            raise ValueError("shape must have at least one axis, got ()")
        for axis, side in enumerate(self.shape):
            check_integer(f"shape[{axis}]", side, low=1)
        if split is None:
            self.split = tuple(-(-side // 4) for side in self.shape)
        else:
            self.split = (split,) * len(self.shape) if isinstance(split, int) else tuple(split)
        if len(self.split) != len(self.shape):
            raise ValueError(f"split must be a number or {len(self.shape)} numbers, got {split!r}")
        for axis, side in enumerate(self.split):
            check_integer(f"split[{axis}]", side, low=1)
        self.num_latents = num_latents
        self.whole: Box = tuple((0, side) for side in self.shape)
        self.cuts: dict[Box, list[tuple[Box, Box]]] = {}
        waiting = [self.whole]
        while waiting:
            box = waiting.pop()
            if box in self.cuts:
                continue
            found = self._all_cuts(box)
            if len(found) > max_cuts:
                chosen = torch.randperm(len(found), generator=generator, device=generator.device)[:max_cuts]
                found = [found[number] for number in sorted(chosen.tolist())]
            self.cuts[box] = found
            waiting.extend(part for parts in found for part in parts)
        self.smallest = sorted(box for box, cuts in self.cuts.items() if not cuts)

    def _all_cuts(self, box: Box) -> list[tuple[Box, Box]]:
        found = []
        for axis, ((start, stop), side) in enumerate(zip(box, self.split, strict=True)):
            for at in range((start // side + 1) * side, stop, side):
                lower = (*box[:axis], (start, at), *box[axis + 1 :])
                upper = (*box[:axis], (at, stop), *box[axis + 1 :])
                found.append((lower, upper))
        return found

    def cells(self, box: Box) -> list[int]:
        """Variables of a box."""
        strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        places = itertools.product(*(range(start, stop) for start, stop in box))
        return [sum(at * stride for at, stride in zip(place, strides, strict=True)) for place in places]

    def add_boxes(self, regions: list[Region], known: dict[Box, int]) -> dict[str, Table]:
        """Append the boxes above those that are known, up to the root; their tables."""
        known = dict(known)
        sizes: dict[int, int] = {}

        def levels(box: Box, found: dict[Box, int]) -> int:
            if box not in found:
                parts = (part for parts in self.cuts[box] for part in parts)
                found[box] = 1 + max((levels(part, found) for part in parts), default=-1)
            return found[box]

        depth: dict[Box, int] = {}
        levels(self.whole, depth)
        for box in sorted((box for box in self.cuts if self.cuts[box]), key=lambda box: (depth[box], box)):
            products = []
            for lower, upper in self.cuts[box]:
                regions.append(Product((known[lower], known[upper])))
                products.append(len(regions) - 1)
            if box == self.whole:
                regions.append(Sum(tuple(products), "initial"))
            else:
                number = sizes.setdefault(len(products), 0)
                sizes[len(products)] += 1
                regions.append(Sum(tuple(products), f"mixture_{len(products)}", number))
            known[box] = len(regions) - 1
        width = self.num_latents
        if not self.cuts[self.whole]:
            regions.append(Sum((known[self.whole],), "initial"))
        tables = {
            f"mixture_{cuts}": Table((boxes, width, cuts * width), "weights") for cuts, boxes in sizes.items()
        }
        tables["initial"] = Table((max(1, len(self.cuts[self.whole])) * width,), "weights")
        return tables
