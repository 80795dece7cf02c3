"""Hidden Chow-Liu trees: a latent variable beside each variable, tied to the others along a Chow-Liu tree.

    p(x) = sum_z pi[z_root] prod_{i != root} A_i[z_parent(i), z_i] prod_i E_i[z_i, x_i]

Source: Liu and Van den Broeck, "Tractable regularization of probabilistic circuits" (arXiv:2106.02264).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from piste_algorithms._checks import check_integer, check_range
from piste_algorithms.circuits.chow_liu import check_data, mutual_information, of_edges, spanning_tree
from piste_algorithms.circuits.circuit import Circuit
from piste_algorithms.circuits.structure import Leaf, Product, Region, Structure, Sum, Table
from piste_algorithms.circuits.tables import MINIMUM_VARIANCE, random_table


def hclt(
    data: Tensor,
    num_latents: int,
    num_categories: int | None = None,
    bins: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.0,
) -> Circuit:
    """A hidden Chow-Liu tree with random parameters, its tree learnt from data.

    Args:
        data: `(samples, variables)`, whole numbers with -1 where missing, or floating-point with NaN where
            missing; then leaves are normal, their means drawn around those of the data.
        num_latents: states of every latent variable.
        num_categories: of all variables; None: the largest value in the data and one, or real values.
        bins: for the tree alone, take the categories of a variable together in so many equal ranges.
        generator: draws the parameters; None: one of seed 0.
        dtype: float32 or float64.
        spread: rows of the tables are exp(-spread U[0, 1]), normalised.

    Returns:
        A circuit with the tables `initial` (num_latents,), `transition` (variables - 1, num_latents,
        num_latents), a matrix an edge, and `emission` (variables, num_latents, num_categories) or (variables,
        num_latents, 2); `structure.description["parents"]` is the tree, `["information"]` that of each
        variable and its parent, in nats.

    Raises:
        ValueError: if an argument is outside its range.
    """
    check_integer("num_latents", num_latents, low=1)
    count = check_data(data, num_categories)
    information = mutual_information(data, num_categories, bins)
    parents = spanning_tree(information)
    regions: list[Region] = []
    (root,) = add_forest(regions, parents).values()
    regions.append(Sum((root,), "initial"))
    tables = {
        "initial": Table((num_latents,), "weights"),
        **forest_tables(parents, num_latents, count),
    }
    description = {"builder": "hclt", "parents": parents, "information": of_edges(information, parents)}
    structure = Structure(tuple(regions), tables, description)
    return random_circuit(structure, generator, dtype, spread, data)


def add_forest(regions: list[Region], parents: Sequence[int]) -> dict[int, int]:
    """Append the latent trees of `parents` to the regions.

    Leaves use `emission[variable]`, edges `transition[number]`, numbered from the leaves up so that a fold's
    matrices lie side by side.

    Returns:
        By root, the region whose nodes are the states of the root's latent variable.
    """
    heights = _heights(parents)
    messages: list[list[int]] = [[] for _ in parents]
    roots = {}
    edges = 0
    first = len(regions)
    regions.extend(Leaf(variable, "emission", variable) for variable in range(len(parents)))
    for variable in sorted(range(len(parents)), key=lambda variable: (heights[variable], variable)):
        node = first + variable
        if messages[variable]:
            regions.append(Product((node, *messages[variable])))
            node = len(regions) - 1
        if parents[variable] < 0:
            roots[variable] = node
        else:
            regions.append(Sum((node,), "transition", edges))
            messages[parents[variable]].append(len(regions) - 1)
            edges += 1
    return roots


def forest_tables(parents: Sequence[int], num_latents: int, count: int | None) -> dict[str, Table]:
    """The tables that `add_forest` names."""
    edges = sum(parent >= 0 for parent in parents)
    entries, variables = 2 if count is None else count, len(parents)
    emission = Table((variables, num_latents, entries), "gaussian" if count is None else "categorical")
    if edges == 0:
        return {"emission": emission}
    return {"transition": Table((edges, num_latents, num_latents), "weights"), "emission": emission}


def random_circuit(
    structure: Structure,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    spread: float,
    data: Tensor | None = None,
) -> Circuit:
    """A circuit with random parameters; normal leaves of `emission` are placed where the data are.

    Raises:
        ValueError: if `spread` is negative or infinite.
    """
    check_range("spread", spread, low=0.0)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parameters = {
        name: random_table(table, generator, dtype, spread) for name, table in structure.tables.items()
    }
    if data is not None and data.is_floating_point():
        mean = data.double().nanmean(0)
        variance = (data.double() - mean).square().nanmean(0)
        mean, variance = mean.nan_to_num(0.0), variance.nan_to_num(1.0).clamp_min(MINIMUM_VARIANCE)
        # mean ~ N(mean of the data, variance of the data), variance = variance of the data
        emission = parameters["emission"]
        emission[..., 0] = (mean[:, None] + variance.sqrt()[:, None] * emission[..., 0]).to(dtype)
        emission[..., 1] = variance[:, None].to(dtype)
    return Circuit(structure, parameters)


def _heights(parents: Sequence[int]) -> list[int]:
    """Edges from each variable to the furthest one below it."""
    heights = [0] * len(parents)
    for variable in range(len(parents)):
        below, at = 0, variable
        while parents[at] >= 0:
            below, at = below + 1, parents[at]
            if heights[at] >= below:
                break
            heights[at] = below
    return heights
