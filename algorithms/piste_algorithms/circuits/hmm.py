"""Hidden Markov models as circuits.

    p(x) = sum_z pi[z_0] prod_t E_t[z_t, x_t] prod_{t > 0} A_t[z_{t-1}, z_t]

The tables are `initial` (pi), `transition` (A) and `emission` (E); in a homogeneous model all positions share
A and E. Source: Rabiner, "A tutorial on hidden Markov models" (1989).
"""

from __future__ import annotations

import torch

from piste_algorithms._checks import check_integer
from piste_algorithms.circuits.circuit import Circuit
from piste_algorithms.circuits.hclt import random_circuit
from piste_algorithms.circuits.structure import Leaf, Product, Region, Structure, Sum, Table, TableKind


def hmm(
    length: int,
    num_latents: int,
    num_categories: int | None,
    homogeneous: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.0,
) -> Circuit:
    """A hidden Markov model over `length` variables, with random parameters.

    Args:
        length: number of positions.
        num_latents: number of hidden states.
        num_categories: categories of a position, or None for real values with normal densities.
        homogeneous: whether all positions share `transition` and `emission`.
        generator: draws the parameters, on the device where they are to be; None: one of seed 0.
        dtype: float32 or float64.
        spread: rows of the tables are exp(-spread U[0, 1]), normalised.

    Returns:
        A circuit with the tables `initial` (num_latents,), `transition` (num_latents, num_latents), row to
        column, and `emission` (num_latents, num_categories), or (num_latents, 2) for normal densities; where
        not homogeneous with a leading axis of length - 1 and length. At length 1 there is no `transition`.

    Raises:
        ValueError: if an argument is outside its range.
    """
    check_integer("length", length, low=1)
    check_integer("num_latents", num_latents, low=1)
    if num_categories is not None:
        check_integer("num_categories", num_categories, low=1)
    kind: TableKind = "gaussian" if num_categories is None else "categorical"
    entries = 2 if num_categories is None else num_categories
    regions: list[Region] = []
    for t in range(length - 1, -1, -1):
        below = len(regions) - 1  # the chain from position t + 1 on
        if t < length - 1:
            regions.append(Sum((below,), "transition", 0 if homogeneous else t))
        regions.append(Leaf(t, "emission", 0 if homogeneous else t))
        if t < length - 1:
            regions.append(Product((len(regions) - 1, len(regions) - 2)))
    regions.append(Sum((len(regions) - 1,), "initial"))
    tables = {"initial": Table((num_latents,), "weights")}
    transition, emission = (num_latents, num_latents), (num_latents, entries)
    if length > 1:
        tables["transition"] = Table(transition if homogeneous else (length - 1, *transition), "weights")
    tables["emission"] = Table(emission if homogeneous else (length, *emission), kind)
    description = {"builder": "hmm", "length": length, "homogeneous": homogeneous}
    structure = Structure(tuple(regions), tables, description)
    return random_circuit(structure, generator, dtype, spread)
