"""Circuits of any structure: folds of regions, evaluated in the linear domain with a scale for each region.

With values v_r exp(s_r), of which those of products have the largest entry 1:

    product   v = prod_c v_c / m,   s = sum_c s_c + log m,   m = the largest entry
    sum       v = W (v_c exp(s_c - s)),   s = max_c s_c,   log p(x) = log v_root + s_root
    flows     q = F_n / v_n,   F[W] = W (q^T v_c),   F_c = v_c (W^T q)

A row that vanishes to rounding, or whose flows do not add up, is reported, for the log domain. The analytic
backward pass is that of Peharz et al., "Einsum networks" (arXiv:2004.06231); TD of Liu et al.,
"Rethinking probabilistic circuit parameter learning" (2025).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from piste_algorithms.circuits.folding import Fold, Gather, Rows, fold, take
from piste_algorithms.circuits.leaves import Leaves, make_leaves
from piste_algorithms.circuits.log_domain import IMPOSSIBLE, LOG_ZERO
from piste_algorithms.circuits.structure import Structure
from piste_algorithms.circuits.tables import stacked

# A product of so many factors, none of them above 1, is scaled before the next one is multiplied.
_FACTORS_UNSCALED = 3


class Folded:
    """Evaluates a circuit fold by fold."""

    def __init__(self, structure: Structure, device: torch.device) -> None:
        self.structure = structure
        self.folding = fold(structure, device)
        kept = (*self.folding.value_rows.items(), *self.folding.log_rows.items())
        held = sum(width * count for width, count in kept)
        moved = sum(width * count for width, count in self.folding.flow_rows.items())
        largest = max(
            len(each.regions) * (each.width + sum(child.width for child in each.children))
            for each in self.folding.folds
        )
        self.layer_entries = largest  # a row's activations in one fold and its children
        self.value_entries = held + largest  # what `log_likelihood` holds for a row
        self.row_entries = held + moved + 2 * largest  # what `flows` holds for a row

    def log_likelihood(self, tables: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Log-likelihood of each row, -inf where it vanishes to rounding."""
        return _Pass(self, tables, x, None).forward()

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
            Log-likelihood of each row, and which rows this evaluation is sure of.
        """
        evaluation = _Pass(self, tables, x, statistics)
        log_likelihood = evaluation.forward()
        keep = keep & torch.isfinite(log_likelihood)
        total = evaluation.backward(keep)
        # The flows of the leaves of each variable sum to one.
        return log_likelihood, keep & ((total - self.structure.variables).abs() < 0.1)

    def top_down(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """TD(n) of the nodes of each table, `(matrices, nodes)`, summed over the regions that share it."""
        some = next(iter(tables.values()))
        masses = {
            name: some.new_zeros((table.matrices, table.nodes))
            for name, table in self.structure.tables.items()
        }
        buffers = {width: some.new_zeros((count, width)) for width, count in self.folding.flow_rows.items()}
        buffers[1][0] = 1.0  # the root
        for each in reversed(self.folding.folds):
            here = take(buffers[each.width], each.flows)
            if each.kind == "product":
                for child in each.children:
                    if len(child.owners) > 0:
                        _hand_down(buffers[child.width], child, here.clone())
                continue
            _add_rows(masses[each.table], each.indices, here)
            if each.kind == "sum":
                # TD(c) += sum_n W[n, c] TD(n)
                weights = take(stacked(tables[each.table]), each.indices)
                below = torch.bmm(here[:, None, :], weights)[:, 0]
                start = 0
                for child in each.children:
                    _hand_down(buffers[child.width], child, below[:, start : start + child.width])
                    start += child.width
        return masses


class _Pass:
    """Buffers of one batch."""

    def __init__(
        self,
        engine: Folded,
        tables: Mapping[str, Tensor],
        x: Tensor,
        statistics: Mapping[str, Tensor] | None,
    ) -> None:
        self.engine, self.tables, self.x, self.statistics = engine, tables, x, statistics
        some = next(iter(tables.values()))
        self.tiny = torch.finfo(some.dtype).tiny
        self.values = {
            width: some.new_empty((count, len(x), width))
            for width, count in engine.folding.value_rows.items()
        }
        self.logs = {
            width: some.new_empty((count, len(x), width)) for width, count in engine.folding.log_rows.items()
        }
        self.scales = some.new_zeros((len(engine.structure.regions), len(x)), dtype=torch.float64)
        self.leaves: dict[int, Leaves] = {}

    def forward(self) -> Tensor:
        """Values of all folds; log-likelihoods `(batch,)`, float64."""
        for number, each in enumerate(self.engine.folding.folds):
            if each.kind == "leaf":
                self._leaf(number, each)
            elif each.kind == "sum":
                self._sum(each)
            elif each.logarithmic:
                self._log_product(each)
            else:
                self._product(each)
        # log p(x) = log v_root + s_root
        return self.values[1][-1, :, 0].double().log() + self.scales[-1]

    def _leaf(self, number: int, each: Fold) -> None:
        leaves = make_leaves(
            self.engine.structure.tables[each.table],
            self.tables[each.table],
            each.leaf_indices,
            each.variables,
            self.x,
            None if self.statistics is None else self.statistics[each.table],
        )
        self.leaves[number] = leaves
        here = self.values[each.width][each.start : each.stop]
        if each.logarithmic:
            here.copy_(leaves.log_values(0, len(each.regions)))
            return
        here.copy_(leaves.values(0, len(each.regions)))
        scale = leaves.scale(0, len(each.regions))
        if scale is not None:
            self.scales[each.regions] = scale.double()

    def _product(self, each: Fold) -> None:
        buffer = self.values[each.width]
        scale = torch.zeros_like(self.scales[: len(each.regions)])
        total = buffer.new_empty(0)
        for place, child in enumerate(each.children):
            factor = take(buffer, child.values)
            if place == 0:
                total = factor.clone() if isinstance(child.values, slice) else factor
            else:
                total.mul_(factor)
            scale += self.scales.index_select(0, child.regions)
            if place % _FACTORS_UNSCALED == _FACTORS_UNSCALED - 1 and place < len(each.children) - 1:
                largest = total.amax(-1, keepdim=True)
                total.mul_(largest.clamp_min(self.tiny).reciprocal_())
                scale += _log(largest[..., 0])
        # v = prod_c v_c / m,   s = sum_c s_c + log m
        largest = total.amax(-1, keepdim=True)
        torch.mul(total, largest.clamp_min(self.tiny).reciprocal_(), out=buffer[each.start : each.stop])
        self.scales[each.regions] = scale.add_(_log(largest[..., 0]))

    def _log_product(self, each: Fold) -> None:
        """A product of leaves alone: the logarithms of a row's nodes may be any distance apart."""
        total = self.logs[each.width][each.log_start : each.log_start + len(each.regions)]
        scale = torch.zeros_like(self.scales[: len(each.regions)])
        for place, child in enumerate(each.children):
            buffer = self.logs if child.form == "buffer" else self.values
            term = take(buffer[each.width], child.values)
            if child.form == "values":
                term = term.log()
                scale += self.scales.index_select(0, child.regions)
            if place == 0:
                total.copy_(term)
            else:
                total.add_(term)
        total.add_(scale.to(total.dtype)[..., None]).clamp_min_(LOG_ZERO)
        # v = exp(log v - m),   s = m
        largest = total.amax(-1, keepdim=True)
        found = (total - largest).exp_().masked_fill_(total < IMPOSSIBLE, 0.0)
        self.values[each.width][each.start : each.stop] = found
        self.scales[each.regions] = largest[..., 0].double()

    def _sum(self, each: Fold) -> None:
        weights = take(stacked(self.tables[each.table]), each.indices)
        below, scale = self._below(each)
        # v = W (v_c exp(s_c - s))
        torch.bmm(below, weights.transpose(1, 2), out=self.values[each.width][each.start : each.stop])
        self.scales[each.regions] = scale

    def _below(self, each: Fold) -> tuple[Tensor, Tensor]:
        """Children's values side by side in one scale, `(regions, batch, children)`, and that scale."""
        scales = [self.scales.index_select(0, child.regions) for child in each.children]
        parts = [take(self.values[child.width], child.values) for child in each.children]
        if len(parts) == 1:
            return parts[0], scales[0]
        # s = max_c s_c
        largest = torch.stack(scales).amax(0)
        dtype = parts[0].dtype
        shifts = [(own - largest).exp_().to(dtype)[..., None] for own in scales]
        return torch.cat([part * shift for part, shift in zip(parts, shifts, strict=True)], -1), largest

    def backward(self, keep: Tensor) -> Tensor:
        """Add the flows of the rows to keep; returns the sum of each row's flows of leaves, `(batch,)`."""
        assert self.statistics is not None
        folding = self.engine.folding
        floor = self.tiny**0.8
        flows = {
            width: self.values[1].new_zeros((count, len(self.x), width))
            for width, count in folding.flow_rows.items()
        }
        # F_root = 1
        flows[1][0, :, 0] = keep.to(self.values[1].dtype)
        leaf_flows = torch.zeros_like(keep, dtype=torch.float64)
        for number in range(len(folding.folds) - 1, -1, -1):
            each = folding.folds[number]
            here = take(flows[each.width], each.flows)
            if each.kind == "leaf":
                leaf_flows += here.sum((0, 2))
                shared = isinstance(each.flows, slice)
                self.leaves[number].add_flows(0, len(each.regions), here.clone() if shared else here)
                self.leaves[number].finish()
            elif each.kind == "product":
                for child in each.children:
                    if len(child.owners) > 0:
                        _hand_down(flows[child.width], child, here.clone())
            else:
                weights = take(stacked(self.tables[each.table]), each.indices)
                below, _ = self._below(each)
                # q = F_n / v_n
                ratio = here / self.values[each.width][each.start : each.stop].clamp_min(floor)
                # F[W] / W += q^T v_c
                into = stacked(self.statistics[each.table])
                if isinstance(each.indices, slice):
                    into[each.indices].baddbmm_(ratio.transpose(1, 2), below)
                else:
                    _add_rows(into, each.indices, torch.bmm(ratio.transpose(1, 2), below))
                # F_c = v_c (W^T q)
                handed = torch.bmm(ratio, weights).mul_(below)
                start = 0
                for child in each.children:
                    part = handed if len(each.children) == 1 else handed[..., start : start + child.width]
                    _hand_down(flows[child.width], child, part)
                    start += child.width
        return leaf_flows


def _log(largest: Tensor) -> Tensor:
    """Its logarithm in float64, and of zero a number that no other scale comes near."""
    return largest.double().log().clamp_min_(LOG_ZERO)


def _hand_down(buffer: Tensor, child: Gather, flow: Tensor) -> None:
    """Add the flows of children to their rows; those that share their parent's row have it already."""
    if len(child.owners) == len(flow):
        buffer.index_add_(0, child.flows, flow)
    elif len(child.owners) > 0:
        buffer.index_add_(0, child.flows, flow.index_select(0, child.owners))


def _add_rows(into: Tensor, at: Rows, values: Tensor) -> None:
    if isinstance(at, slice):
        into[at] += values
    else:
        into.index_add_(0, at, values)
