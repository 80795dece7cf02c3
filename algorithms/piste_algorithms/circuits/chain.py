"""Hidden Markov models: a scan of scaled forward and backward messages in the linear domain.

A circuit is a chain when, from the root down, each sum mixes the product of one leaf and the next sum. With
pi the root's weights, A_t those between the positions t - 1 and t, and e_t the leaf's values at the position
t:

    u_0 = pi,   u_t = a_{t-1} A_t,   v_t = u_t e_t,   c_t = sum v_t,   a_t = v_t / c_t
    log p(x) = sum_t log c_t
    g_t = a_t b_t / s_t,   s_t = sum a_t b_t                                   (flows of the leaf's nodes)
    w_t = e_t b_t / (c_t s_t),   F[A_t] += A_t (a_{t-1}^T w_t),   b_{t-1} = w_t A_t^T / max,   b_{T-1} = 1

Messages b are scaled to a maximum of 1, so nothing overflows; a row whose s_t or c_t vanishes to rounding is
reported, for the log domain. Source: Rabiner, "A tutorial on hidden Markov models" (1989).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from piste_algorithms.circuits.leaves import Leaves, make_leaves
from piste_algorithms.circuits.structure import Leaf, Product, Structure, Sum
from piste_algorithms.circuits.tables import stacked


@dataclass(frozen=True)
class Links:
    """Which parameters a chain uses at each position, from the root down."""

    root: tuple[str, int]
    transition: str | None  # its table; None for a single position
    transitions: tuple[int, ...]  # (length - 1,) indices
    emission: str
    emissions: tuple[int, ...]  # (length,) indices
    variables: tuple[int, ...]  # (length,)


def find_chain(structure: Structure) -> Links | None:
    """The links of a circuit that is a chain over all its regions, or None."""
    regions = structure.regions
    sums: list[Sum] = []
    leaves: list[Leaf] = []
    visited = 0
    at = len(regions) - 1
    while True:
        region = regions[at]
        if not isinstance(region, Sum) or len(region.children) != 1:
            return None
        sums.append(region)
        below = regions[region.children[0]]
        if isinstance(below, Leaf):
            leaves.append(below)
            visited += 2
            break
        if not isinstance(below, Product) or len(below.children) != 2:
            return None
        first, second = below.children
        leaf, rest = (first, second) if isinstance(regions[first], Leaf) else (second, first)
        found = regions[leaf]
        if not isinstance(found, Leaf):
            return None
        leaves.append(found)
        visited += 3
        at = rest
    transitions, emissions = {link.table for link in sums[1:]}, {leaf.table for leaf in leaves}
    if visited != len(regions) or len(transitions) > 1 or len(emissions) > 1 or sums[0].table in transitions:
        return None
    return Links(
        (sums[0].table, sums[0].index),
        next(iter(transitions), None),
        tuple(link.index for link in sums[1:]),
        leaves[0].table,
        tuple(leaf.index for leaf in leaves),
        tuple(leaf.variable for leaf in leaves),
    )


class Chain:
    """Evaluates a circuit that is a chain."""

    def __init__(self, structure: Structure, links: Links) -> None:
        self.structure = structure
        self.links = links
        self.length = len(links.variables)
        self.width = structure.tables[links.emission].nodes
        self.layer_entries = 2 * self.width  # a row's activations in one sum and one product
        self.row_entries = self.length * self.width + 6 * self.width  # what `flows` holds for a row
        self.value_entries = 4 * self.width  # what `log_likelihood` holds for a row

    def log_likelihood(self, tables: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Log-likelihood of each row, -inf where it vanishes to rounding."""
        leaves = self._leaves(tables, x, None)
        messages = tables[self.links.root[0]].new_empty((2, len(x), self.width))
        return self._forward(tables, leaves, [messages[t % 2] for t in range(self.length)])[0]

    def flows(
        self, tables: Mapping[str, Tensor], x: Tensor, statistics: Mapping[str, Tensor], keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the flows of the rows to keep to `statistics`; those of weights are not yet times the weights.

        Args:
            tables: parameters.
            x: `(batch, variables)`.
            statistics: what is added to.
            keep: `(batch,)` booleans, the rows to count.

        Returns:
            Log-likelihood of each row, and which rows this scan is sure of.
        """
        links = self.links
        leaves = self._leaves(tables, x, statistics)
        messages = list(tables[links.root[0]].new_empty((self.length, len(x), self.width)).unbind(0))
        log_likelihood, norms = self._forward(tables, leaves, messages)
        floor = torch.finfo(norms.dtype).tiny ** 0.8
        keep = keep & torch.isfinite(log_likelihood)
        kept = keep.to(norms.dtype)
        sure = keep.clone()

        backward = torch.ones_like(messages[0])
        for t in range(self.length - 1, -1, -1):
            # g_t = a_t b_t / s_t
            flow = messages[t].mul_(backward)
            total = flow.sum(-1)
            sure &= total * norms[t] > floor
            inverse = kept / total.clamp_min(floor)
            leaves.add_flows(t, t + 1, flow.mul_(inverse[:, None])[None])
            # w_t = e_t b_t / (c_t s_t)
            backward.mul_(leaves.values(t, t + 1)[0])
            backward.mul_((inverse / norms[t].clamp_min(floor))[:, None])
            if t == 0:
                # F[pi] / pi += w_0
                stacked(statistics[links.root[0]])[links.root[1], 0].add_(backward.sum(0))
                break
            # F[A_t] / A_t += a_{t-1}^T w_t
            self._transition(statistics, t).addmm_(messages[t - 1].T, backward)
            # b_{t-1} = w_t A_t^T / max
            backward = backward @ self._transition(tables, t).T
            backward.mul_(backward.amax(-1, keepdim=True).clamp_min(floor).reciprocal_())
        leaves.finish()
        return log_likelihood, sure

    def top_down(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """TD(n) of the nodes of each table, `(matrices, nodes)`, summed over the regions that share it."""
        links = self.links
        masses = {
            name: tables[name].new_zeros((table.matrices, table.nodes))
            for name, table in self.structure.tables.items()
        }
        masses[links.root[0]][links.root[1]] += 1.0
        # TD(z_0) = pi,   TD(z_t) = TD(z_{t-1}) A_t
        state = stacked(tables[links.root[0]])[links.root[1], 0]
        for t in range(self.length):
            if t > 0:
                assert links.transition is not None
                masses[links.transition][links.transitions[t - 1]] += state
                state = state @ self._transition(tables, t)
            masses[links.emission][links.emissions[t]] += state
        return masses

    def _transition(self, tables: Mapping[str, Tensor], t: int) -> Tensor:
        assert self.links.transition is not None
        return stacked(tables[self.links.transition])[self.links.transitions[t - 1]]

    def _leaves(
        self, tables: Mapping[str, Tensor], x: Tensor, statistics: Mapping[str, Tensor] | None
    ) -> Leaves:
        name = self.links.emission
        return make_leaves(
            self.structure.tables[name],
            tables[name],
            torch.tensor(self.links.emissions, device=x.device),
            torch.tensor(self.links.variables, device=x.device),
            x,
            None if statistics is None else statistics[name],
        )

    def _forward(
        self, tables: Mapping[str, Tensor], leaves: Leaves, messages: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Write a_t into `messages[t]`; log-likelihoods `(batch,)` and the c_t, `(length, batch)`."""
        root = self.links.root
        tiny = torch.finfo(messages[0].dtype).tiny
        norms = messages[0].new_empty((self.length, len(messages[0])))
        log_likelihood = torch.zeros(len(messages[0]), dtype=torch.float64, device=norms.device)
        for t, message in enumerate(messages):
            if t == 0:
                message.copy_(stacked(tables[root[0]])[root[1], 0])
            else:
                torch.mm(messages[t - 1], self._transition(tables, t), out=message)
            # v_t = u_t e_t,   c_t = sum v_t,   a_t = v_t / c_t
            message.mul_(leaves.values(t, t + 1)[0])
            torch.sum(message, -1, out=norms[t])
            message.mul_(norms[t].clamp_min(tiny).reciprocal_()[:, None])
            scale = leaves.scale(t, t + 1)
            if scale is not None:
                log_likelihood += scale[0]
        # log p(x) = sum_t log c_t
        log_likelihood += norms.double().log().sum(0)
        return log_likelihood, norms
