"""Anemone: mini-batch EM whose nodes step as far as the batch says more about them than the model expected.

An update maximises the batch's log-likelihood, linearised in log theta of the normalised circuit, less gamma
= 1 / alpha times the Kullback-Leibler divergence of the new joint distribution of variables and hidden states
from the old one. With flows F[n, c] of M samples and top-down probabilities TD(n) it has the closed form

    G[n, c]     = alpha F[n, c] / M + (1 - alpha) TD(n) theta[n, c]
    theta[n, c] <- (G[n, c] + d / C_n) / (sum_c G[n, c] + d)

that is, each node steps towards EM on the batch with the implicit learning rate

    eta_n = alpha F_n / M / (alpha F_n / M + (1 - alpha) TD(n))

A node that the batch never reaches stays where it is (d = 0), alpha = 1 is EM on the batch, and with alpha =
1 on the whole data set it is full-batch EM. With momentum, moving averages of F and M, corrected for their
start, take their places.

Source: Liu et al., "Rethinking probabilistic circuit parameter learning" (2025), and its code (pyjuice 2.6.3,
`optim/anemone.py`), which averages F alone; M is averaged here too, which is the same for batches of one size
and keeps F / M a mean over samples for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from piste_algorithms._checks import check_integer, check_range
from piste_algorithms.circuits.circuit import Circuit
from piste_algorithms.circuits.rules import LearningRule, node_rates, scheduled
from piste_algorithms.circuits.schedules import Schedule
from piste_algorithms.circuits.tables import from_statistics, mass, moments


class Anemone(LearningRule):
    """EM on mini-batches with a step size of its own for every node.

    Args:
        circuit: learnt in place.
        step_size: alpha in (0, 1], or a schedule: number of updates so far -> alpha. Few, small batches need
            a decay (`cosine_decay(0.4, flat, total, 0.1)`); the authors pair 0.4 decaying to 0.1 with batches
            of 16,384.
        momentum: mu in [0, 1), of the moving average of flows; it lags behind where there are only tens of
            updates.
        updates_every: batches gathered before an update.
        pseudocount: d of each node, relative to the flows of one sample.
        keep_zeros: whether a parameter that is zero stays zero and gets no pseudocount.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        circuit: Circuit,
        step_size: float | Schedule = 0.4,
        momentum: float = 0.0,
        updates_every: int = 1,
        pseudocount: float = 1e-6,
        keep_zeros: bool = True,
    ) -> None:
        super().__init__(circuit, pseudocount)
        check_range("momentum", momentum, low=0.0, high=1.0)
        check_integer("updates_every", updates_every, low=1)
        self._step_size = scheduled(step_size)
        self.momentum = float(momentum)
        self.updates_every = updates_every
        self.keep_zeros = keep_zeros
        self._averages: dict[str, Tensor] = {}
        self._average_samples = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything but the circuit's parameters."""
        averages = {name: tensor.clone() for name, tensor in self._averages.items()}
        return {**super().state_dict(), "averages": averages, "average_samples": self._average_samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: if it is the state of another rule or another circuit.
        """
        super().load_state_dict(state)
        self._averages = self._moved("averages", state["averages"])
        self._average_samples = float(state["average_samples"])

    def _learn(self, flows: dict[str, Tensor], samples: float) -> tuple[float | None, Tensor | None]:
        step_size = self._step_size(self.updates)
        if self.momentum > 0.0:
            flows, samples = self._average(flows, samples)
        expected = self.circuit.node_top_down()
        rates = {}
        for name, table in self.circuit.structure.tables.items():
            parameters, statistics = self.circuit.tables[name], flows[name]
            # G = alpha F / M + (1 - alpha) TD theta
            share = mass(table, statistics) * (step_size / samples)
            statistics.mul_(step_size / samples)
            statistics.addcmul_(expected[name][..., None], moments(table, parameters), value=1 - step_size)
            # eta = alpha F_n / M / G_n
            whole = share + (1 - step_size) * expected[name]
            rates[name] = share / torch.where(whole > 0, whole, torch.ones_like(whole))
            # theta <- (G + d / C) / (sum G + d)
            parameters.copy_(
                from_statistics(table, statistics, parameters, self.pseudocount, self.keep_zeros)
            )
        return step_size, node_rates(self.circuit, rates)

    def _average(self, flows: dict[str, Tensor], samples: float) -> tuple[dict[str, Tensor], float]:
        if not self._averages:
            self._averages = self.circuit.empty_statistics()
        # m <- mu m + (1 - mu) F,   F <- m / (1 - mu^(u + 1)),   and M likewise
        correction = 1 / (1 - self.momentum ** (self.updates + 1))
        self._average_samples = self.momentum * self._average_samples + (1 - self.momentum) * samples
        for name, average in self._averages.items():
            average.lerp_(flows[name], 1 - self.momentum)
            torch.mul(average, correction, out=flows[name])
        return flows, self._average_samples * correction
