"""The structure of a probabilistic circuit: regions of leaves, products and sums, and the tables they use.

A region is a vector of nodes over the same variables. With the vector v_r(x) of a region r, bottom-up:

    leaf      v_r[n] = table[index][n, x_variable]            (or a normal density)
    product   v_r[n] = prod_c v_c[n]                          (all regions of one width, disjoint variables)
    sum       v_r[n] = sum_c table[index][n, c] v[c]          (v: the children's vectors one after the other)

The last region is the root, a single node: p(x) = v_root[0]. Regions that name the same table and index share
parameters (they are *tied*). A circuit is tractable when it is smooth (children of a sum have the same
variables) and decomposable (children of a product have disjoint ones); `Structure` refuses any other and
names the node.

Source: Choi, Vergari, Van den Broeck, "Probabilistic circuits: a unifying framework" (2020); layered vectors
of nodes as in Peharz et al., "Einsum networks" (arXiv:2004.06231).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

TableKind = Literal["weights", "categorical", "gaussian"]


@dataclass(frozen=True)
class Leaf:
    """Input nodes over one variable: the rows of `table[index]`."""

    variable: int
    table: str
    index: int = 0


@dataclass(frozen=True)
class Product:
    """Elementwise product of its children."""

    children: tuple[int, ...]


@dataclass(frozen=True)
class Sum:
    """Mixtures of all nodes of its children, with the weights `table[index]`."""

    children: tuple[int, ...]
    table: str
    index: int = 0


Region = Leaf | Product | Sum


@dataclass(frozen=True)
class Table:
    """Shape and meaning of a parameter tensor.

    Attributes:
        shape: `(..., nodes, entries)`; `(entries,)` is a single node. The axes before the last two are
            indices of matrices, at most one of them.
        kind: `"weights"` of sums or `"categorical"` leaves, whose rows sum to one, or `"gaussian"` leaves,
            whose entries are (mean, variance).
    """

    shape: tuple[int, ...]
    kind: TableKind

    @property
    def matrices(self) -> int:
        """How many matrices the table holds."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def nodes(self) -> int:
        """Rows of a matrix."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def entries(self) -> int:
        """Columns of a matrix: children, categories, or two for a normal density."""
        return self.shape[-1]


@dataclass(frozen=True)
class Structure:
    """A valid circuit without its parameters.

    Args:
        regions: children before parents, the root last.
        tables: every table by its name.
        description: what its builder has to say about it (plain JSON values), such as a learned tree.

    Raises:
        ValueError: if it is not smooth, not decomposable or otherwise broken; the message names the region.
    """

    regions: tuple[Region, ...]
    tables: Mapping[str, Table]
    description: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Number of nodes of each region."""
        widths: list[int] = []
        for region in self.regions:
            widths.append(
                widths[region.children[0]] if isinstance(region, Product) else self.tables[region.table].nodes
            )
        return tuple(widths)

    @cached_property
    def variables(self) -> int:
        """Number of variables."""
        return 1 + max(region.variable for region in self.regions if isinstance(region, Leaf))

    @cached_property
    def categories(self) -> tuple[int, ...]:
        """Categories of each variable; 0 for a real-valued one."""
        found = [0] * self.variables
        for region in self.regions:
            if isinstance(region, Leaf):
                table = self.tables[region.table]
                found[region.variable] = table.entries if table.kind == "categorical" else 0
        return tuple(found)

    @property
    def real_valued(self) -> bool:
        """Whether a variable is real-valued, so that data are floating-point with NaN for missing."""
        return 0 in self.categories

    @cached_property
    def parents(self) -> tuple[tuple[int, ...], ...]:
        """Parents of each region."""
        found: list[list[int]] = [[] for _ in self.regions]
        for number, region in enumerate(self.regions):
            for child in children_of(region):
                found[child].append(number)
        return tuple(map(tuple, found))

    def describe(self, number: int) -> str:
        """A region in words, for messages."""
        return _describe(number, self.regions[number])


def children_of(region: Region) -> tuple[int, ...]:
    """Children of a region; a leaf has none."""
    return () if isinstance(region, Leaf) else region.children


def region_of(structure: Structure, table: str, index: int) -> int | None:
    """The first region that uses `table[index]`."""
    for number, region in enumerate(structure.regions):
        if not isinstance(region, Product) and region.table == table and region.index == index:
            return number
    return None


def to_json(structure: Structure) -> dict[str, Any]:
    """The structure as plain JSON values."""
    regions: list[list[Any]] = []
    for region in structure.regions:
        if isinstance(region, Leaf):
            regions.append(["leaf", region.variable, region.table, region.index])
        elif isinstance(region, Product):
            regions.append(["product", list(region.children)])
        else:
            regions.append(["sum", list(region.children), region.table, region.index])
    tables = {name: [list(table.shape), table.kind] for name, table in structure.tables.items()}
    return {"regions": regions, "tables": tables, "description": dict(structure.description)}


def from_json(value: Mapping[str, Any]) -> Structure:
    """The structure that `to_json` wrote.

    Raises:
        ValueError: if it is none.
    """
    try:
        regions: list[Region] = []
        for kind, *rest in value["regions"]:
            if kind == "leaf":
                regions.append(Leaf(*rest))
            elif kind == "product":
                regions.append(Product(tuple(rest[0])))
            elif kind == "sum":
                regions.append(Sum(tuple(rest[0]), *rest[1:]))
            else:
                raise ValueError(f"a region must be a leaf, a product or a sum, got {kind!r}")
        tables = {name: Table(tuple(shape), kind) for name, (shape, kind) in value["tables"].items()}
        return Structure(tuple(regions), tables, dict(value["description"]))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"this is no structure of a circuit: {error!r}") from error


def _describe(number: int, region: Region) -> str:
    if isinstance(region, Leaf):
        return f"region {number} (leaf of variable {region.variable}, {region.table}[{region.index}])"
    over = ", ".join(map(str, region.children[:8])) + (", ..." if len(region.children) > 8 else "")
    if isinstance(region, Product):
        return f"region {number} (product of regions {over})"
    return f"region {number} (sum over regions {over}, {region.table}[{region.index}])"


def _check(structure: Structure) -> None:
    for name, table in structure.tables.items():
        if table.kind not in ("weights", "categorical", "gaussian"):
            raise ValueError(
                f"table {name!r} must be of kind weights, categorical or gaussian, got {table.kind!r}"
            )
        least = 1 if table.kind == "weights" else 2
        if not least <= len(table.shape) <= 3 or any(size < 1 for size in table.shape):
            raise ValueError(
                f"table {name!r} must have {least} to 3 axes of at least 1 entry, got {table.shape}"
            )
        if table.kind == "gaussian" and table.entries != 2:
            raise ValueError(
                f"table {name!r} must end in an axis of 2 (mean and variance), got {table.shape}"
            )
    if not structure.regions:
        raise ValueError("regions must hold at least one region")
    scopes: list[int] = []  # the variables of each region, as bits
    widths: list[int] = []
    entries: dict[int, tuple[str, int]] = {}  # kind and categories of each variable
    used: set[int] = set()
    for number, region in enumerate(structure.regions):
        here = _describe(number, region)
        if not isinstance(region, Product):
            _check_table(structure.tables, region, here)
        if isinstance(region, Leaf):
            table = structure.tables[region.table]
            said = entries.setdefault(region.variable, (table.kind, table.entries))
            if said != (table.kind, table.entries):
                raise ValueError(
                    f"{here} is {table.kind} with {table.entries} entries, another leaf of that variable is "
                    f"{said[0]} with {said[1]}"
                )
            scopes.append(1 << region.variable)
            widths.append(table.nodes)
            continue
        if not region.children or not all(0 <= child < number for child in region.children):
            raise ValueError(f"{here} must have children, all of them before it")
        used.update(region.children)
        if isinstance(region, Product):
            scopes.append(_product_scope(region.children, scopes, here))
            if len({widths[child] for child in region.children}) > 1:
                sizes = ", ".join(f"{child}: {widths[child]}" for child in region.children)
                raise ValueError(f"{here} has children of different widths ({sizes})")
            widths.append(widths[region.children[0]])
        else:
            scopes.append(_sum_scope(region.children, scopes, here))
            table = structure.tables[region.table]
            width = sum(widths[child] for child in region.children)
            if table.entries != width:
                raise ValueError(f"{here} has {width} nodes below it, its weights are for {table.entries}")
            widths.append(table.nodes)
    root = len(structure.regions) - 1
    if widths[root] != 1:
        raise ValueError(
            f"the root, {structure.describe(root)}, must be a single node, it has {widths[root]}"
        )
    for number in range(root):
        if number not in used:
            raise ValueError(f"{structure.describe(number)} is no child of any region, and not the root")
    if scopes[root] + 1 != 1 << scopes[root].bit_length():
        absent = next(bit for bit in range(scopes[root].bit_length()) if not scopes[root] >> bit & 1)
        raise ValueError(
            f"no region has variable {absent}; variables must be 0 to {scopes[root].bit_length() - 1}"
        )


def _check_table(tables: Mapping[str, Table], region: Leaf | Sum, here: str) -> None:
    table = tables.get(region.table)
    if table is None:
        raise ValueError(f"{here} names a table that is not there; there are {', '.join(tables)}")
    if (table.kind == "weights") != isinstance(region, Sum):
        raise ValueError(f"{here} cannot use a table of kind {table.kind}")
    if not 0 <= region.index < table.matrices:
        raise ValueError(f"{here}: the index must be in [0, {table.matrices}), got {region.index}")
    if isinstance(region, Leaf) and region.variable < 0:
        raise ValueError(f"{here}: the variable must be at least 0")


def _product_scope(children: Sequence[int], scopes: Sequence[int], here: str) -> int:
    scope = 0
    for child in children:
        if scope & scopes[child]:
            raise ValueError(
                f"{here} is not decomposable: variables {_variables(scope & scopes[child])} are below "
                "more than one of its children"
            )
        scope |= scopes[child]
    return scope


def _sum_scope(children: Sequence[int], scopes: Sequence[int], here: str) -> int:
    first = scopes[children[0]]
    for child in children:
        if scopes[child] != first:
            raise ValueError(
                f"{here} is not smooth: variables {_variables(first ^ scopes[child])} are below region "
                f"{children[0]} or region {child}, not both"
            )
    return first


def _variables(scope: int) -> str:
    found = [str(bit) for bit in range(scope.bit_length()) if scope >> bit & 1]
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
