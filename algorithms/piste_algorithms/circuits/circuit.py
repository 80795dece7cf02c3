"""A probabilistic circuit: a structure with its parameters, and what can be asked of it.

Source: the queries are those of Choi, Vergari, Van den Broeck, "Probabilistic circuits" (2020); flows and
top-down probabilities are named as in Liu et al., "Rethinking probabilistic circuit parameter learning"
(2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from piste_algorithms.circuits import log_domain, queries, storage
from piste_algorithms.circuits.chain import Chain, find_chain
from piste_algorithms.circuits.folded import Folded
from piste_algorithms.circuits.structure import Structure
from piste_algorithms.circuits.tables import (
    check_parameters,
    empty_statistics,
    empty_table,
    moments,
    stacked,
)

# Batches are evaluated in pieces. On a CPU what a piece holds is at most twice the parameters and the
# activations of the whole batch in one layer, or 4 MiB, about what stays in cache, if that is more; elsewhere
# it is 2 GiB.
_CPU_PIECE_BYTES = 2**22
_PIECE_BYTES = 2**31


class Circuit:
    """A smooth, decomposable and normalised probabilistic circuit over discrete or real variables.

    Data are `(batch, variables)`: whole numbers with -1 where a value is missing, or, where a variable is
    real-valued, floating-point numbers with NaN where one is missing (and whole numbers for categories). A
    missing value is summed out, so that a log-likelihood is that of the observed part. Rows on which the fast
    evaluation is not sure of its digits are evaluated once more in the log domain in float64. In float32 it
    takes for zero what is below some 1e-37 of the largest of a region's nodes: parameters that small want
    float64.

    `tables` are the parameters themselves, which learning rules update in place; `structure.description` is
    what the builder has to say, such as the `parents` of a learned tree.

    Args:
        structure: the structure.
        parameters: a tensor for every table, all of one dtype and on one device; they are copied.

    Raises:
        ValueError: if the parameters do not fit, naming the table, the row and the region.
    """

    def __init__(self, structure: Structure, parameters: Mapping[str, Tensor]) -> None:
        check_parameters(structure, parameters)
        absent = [name for name in structure.tables if name not in parameters]
        if absent:
            raise ValueError(f"parameters must hold every table, {', '.join(absent)} is not there")
        kinds = {(tensor.dtype, tensor.device) for tensor in parameters.values()}
        if len(kinds) > 1 or next(iter(kinds))[0] not in (torch.float32, torch.float64):
            raise ValueError(f"parameters must all be float32 or all float64, on one device, got {kinds}")
        self.structure = structure
        ((self.dtype, self.device),) = kinds
        self.tables: dict[str, Tensor] = {}
        for name, table in structure.tables.items():
            self.tables[name] = empty_table(table, self.dtype, self.device).copy_(parameters[name])
        links = find_chain(structure)
        self._engine = Folded(structure, self.device) if links is None else Chain(structure, links)
        self._categories = torch.tensor(structure.categories, device=self.device)
        # A real value's square, over the least variance and summed over a batch, is finite.
        self._largest = torch.finfo(self.dtype).max ** 0.4

    @property
    def variables(self) -> int:
        """Number of variables."""
        return self.structure.variables

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Log-likelihood of the observed part of each row, in nats.

        Args:
            x: `(batch, variables)`, see the class.

        Returns:
            `(batch,)`, in the circuit's dtype; -inf where the probability is zero.

        Raises:
            ValueError: if `x` is empty, of another shape or type, or holds a category outside the table or a
                real value whose square may overflow.
        """
        x = self._checked(x)
        rows = self._rows(len(x), self._engine.value_entries)
        found = torch.cat([self._engine.log_likelihood(self.tables, part) for part in torch.split(x, rows)])
        unsure = torch.nonzero(~torch.isfinite(found))[:, 0]
        if len(unsure) > 0:
            logs = log_domain.log_tables(self.structure, self.tables)
            for part in torch.split(unsure, self._slow_rows()):
                root = log_domain.region_values(self.structure, logs, x[part])[-1][:, 0]
                found[part] = root.masked_fill(root < log_domain.IMPOSSIBLE, -torch.inf)
        return found.to(self.dtype)

    def flows(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-likelihoods, and flows summed over the batch.

        The flow of an edge is dlog p(x) / dlog theta[n, c] with theta free, which is the posterior
        probability that a sample takes it; rows of probability zero have none. Tied regions add up. For
        normal leaves a table holds sum_x F_n(x) (1, x, x^2).

        Args:
            x: `(batch, variables)`, see the class.

        Returns:
            `(batch,)` and a tensor of the table's shape for each table, both in the circuit's dtype.

        Raises:
            ValueError: as `log_likelihood`.
        """
        x = self._checked(x)
        rows = self._rows(len(x), self._engine.row_entries)
        skipped = torch.zeros(len(x), dtype=torch.bool, device=self.device)
        while True:
            statistics = self.empty_statistics()
            found, sure = [], []
            for part, skip in zip(torch.split(x, rows), torch.split(skipped, rows), strict=True):
                log_likelihood, certain = self._engine.flows(self.tables, part, statistics, ~skip)
                found.append(log_likelihood)
                sure.append(certain)
            log_likelihood, certain = torch.cat(found), torch.cat(sure)
            # Rows of which an evaluation became unsure half-way have left something behind: once more
            # without.
            failed = torch.isfinite(log_likelihood) & ~certain & ~skipped
            skipped |= failed
            if not bool(failed.any()):
                break
        for name, table in self.structure.tables.items():
            if table.kind == "weights":
                statistics[name].mul_(self.tables[name])
        unsure = torch.nonzero(~certain)[:, 0]
        if len(unsure) > 0:
            for part in torch.split(unsure, self._slow_rows()):
                log_likelihood[part], slow = log_domain.flows(self.structure, self.tables, x[part])
                for name, each in statistics.items():
                    stacked(each).add_(slow[name].to(self.dtype))
        return log_likelihood.to(self.dtype), statistics

    def node_top_down(self) -> dict[str, Tensor]:
        """TD(n), the probability that a sample visits a node, over tied regions; `(..., nodes)` a table."""
        found = self._engine.top_down(self.tables)
        return {name: found[name].reshape(table.shape[:-1]) for name, table in self.structure.tables.items()}

    def top_down(self) -> dict[str, Tensor]:
        """TD(n) theta[n, c], the flows to expect of a sample of the circuit, in the tables' shapes.

        For normal leaves TD(n) (1, mean, mean^2 + variance).
        """
        return {
            name: mass[..., None] * moments(self.structure.tables[name], self.tables[name])
            for name, mass in self.node_top_down().items()
        }

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the tables: rows of weights and categories, (mean, variance) of normal leaves."""
        return {name: table.clone() for name, table in self.tables.items()}

    def set_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Replace some tables, or all.

        Raises:
            ValueError: if one does not fit, naming the table, the row and the region; none is replaced then.
        """
        check_parameters(self.structure, parameters)
        for name, tensor in parameters.items():
            self.tables[name].copy_(tensor)

    def empty_statistics(self) -> dict[str, Tensor]:
        """Zeros in the shapes of the flows."""
        return {
            name: empty_statistics(table, self.tables[name]).zero_()
            for name, table in self.structure.tables.items()
        }

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Ancestral samples, `(n, variables)`, from a generator on the circuit's device.

        Raises:
            ValueError: if `n` is below 1.
        """
        return queries.sample(self.structure, self.tables, n, generator)

    def conditional_sample(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Each row with its missing values drawn from their distribution given the observed ones.

        Raises:
            ValueError: as `log_likelihood`, or if the observed part of a row has probability zero.
        """
        return queries.conditional_sample(self.structure, self.tables, self._checked(x), generator)

    def mpe(self, x: Tensor) -> Tensor:
        """Each row completed by the most probable joint choice of its missing values *and* all hidden states.

        For a hidden Markov model these are the values along the Viterbi path. The most probable values alone,
        with the hidden states summed out, are NP-hard to find.

        Raises:
            ValueError: as `conditional_sample`.
        """
        return queries.most_probable(self.structure, self.tables, self._checked(x))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Circuit:
        """A copy on another device or in another dtype; the circuit itself where nothing changes."""
        wanted = torch.device(self.device if device is None else device), dtype or self.dtype
        moved = {name: table.to(*wanted) for name, table in self.tables.items()}
        if all(moved[name] is table for name, table in self.tables.items()):
            return self
        return Circuit(self.structure, moved)

    def save(self, path: str | Path) -> None:
        """Write structure and parameters to a safetensors file."""
        storage.save(self.structure, self.tables, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is no circuit, of another version of the format, or broken.
        """
        return cls(*storage.load(Path(path)))

    def _rows(self, batch: int, entries: int) -> int:
        """Rows of a piece whose evaluation holds `entries` numbers a row."""
        size = self.dtype.itemsize
        if self.device.type == "cpu":
            held = sum(table.numel() for table in self.tables.values())
            limit = max(_CPU_PIECE_BYTES, 2 * (held + batch * self._engine.layer_entries) * size)
        else:
            limit = _PIECE_BYTES
        return max(1, limit // (entries * size))

    def _slow_rows(self) -> int:
        """Rows of a piece in the log domain, whose sums hold an edge's number for each row."""
        widest = max(table.nodes * table.entries for table in self.structure.tables.values())
        return max(1, 2**22 // (widest + sum(self.structure.widths)))

    def _checked(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != self.variables or len(x) == 0:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a tensor (batch, {self.variables}) of at least one row, got {found}")
        x = x.to(self.device)
        if not self.structure.real_valued:
            if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
                raise ValueError(f"x must hold whole numbers (int64, -1 where missing), got {x.dtype}")
            x = x.long()
            broken = (x < -1) | (x >= self._categories)
        else:
            if not x.is_floating_point():
                raise ValueError(f"x must be floating-point (NaN where missing), got {x.dtype}")
            discrete = (self._categories > 0) & ~x.isnan()
            broken = discrete & ((x < 0) | (x >= self._categories) | (x != x.floor()))
            broken |= x.abs() > self._largest
        if bool(broken.any()):
            row, column = torch.nonzero(broken)[0].tolist()
            count = self.structure.categories[column]
            wants = f"a whole number from 0 to {count - 1}" if count else f"within {self._largest:.2g} of 0"
            raise ValueError(
                f"x[{row}, {column}] (row, column) must be {wants}, or missing, got {x[row, column].item()}"
            )
        return x
