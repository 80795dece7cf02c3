"""Expectation maximisation of circuits: on the whole data set, on mini-batches, and online.

With flows F[n, c] of the data, F_n = sum_c F[n, c], M samples, pseudocount d and C_n children or categories:

    EM            theta[n, c] <- (F[n, c] + d / C_n) / (F_n + d)
    mini-batch    theta[n, c] <- (1 - alpha) theta[n, c] + alpha (F[n, c] + d / C_n) / (F_n + d)
    online        s[n, c] <- (1 - gamma_k) s[n, c] + gamma_k F[n, c] / M
                  theta[n, c] <- (s[n, c] + d / C_n) / (s_n + d)

Sources: Peharz et al., "Einsum networks" (arXiv:2004.06231), for flows by a backward pass and
the mini-batch rule; Cappe and Moulines, "On-line expectation-maximization algorithm for latent data models"
(2009), for the online one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from piste_algorithms.circuits.circuit import Circuit
from piste_algorithms.circuits.rules import LearningRule, mix, node_rates, scheduled
from piste_algorithms.circuits.schedules import Schedule, power_decay
from piste_algorithms.circuits.tables import from_statistics, mass


class FullBatchEM(LearningRule):
    """EM on everything that was gathered since the last update.

    For a data set that does not fit into one batch, `accumulate` its parts and `update`.

    Args:
        circuit: learnt in place.
        pseudocount: of each node, in samples. With 0 no update lowers the likelihood of the data; a node that
            no sample reaches keeps its row then, and becomes uniform otherwise.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(self, circuit: Circuit, pseudocount: float = 0.0) -> None:
        super().__init__(circuit, pseudocount)

    def _learn(self, flows: dict[str, Tensor], samples: float) -> tuple[float | None, Tensor | None]:
        rates = {}
        for name, table in self.circuit.structure.tables.items():
            parameters = self.circuit.tables[name]
            rates[name] = (mass(table, flows[name]) > 0).to(parameters.dtype)
            parameters.copy_(from_statistics(table, flows[name], parameters, self.pseudocount))
        return 1.0, node_rates(self.circuit, rates)


class MiniBatchEM(LearningRule):
    """A step from the parameters towards those of EM on a batch, the same for every node.

    Args:
        circuit: learnt in place.
        step_size: alpha in (0, 1], or a schedule: number of updates so far -> alpha. 0.1 with batches of 512
            is what the authors of Anemone compare with.
        pseudocount: of each node, in samples of the batch.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self, circuit: Circuit, step_size: float | Schedule = 0.1, pseudocount: float = 1e-6
    ) -> None:
        super().__init__(circuit, pseudocount)
        self._step_size = scheduled(step_size)

    def _learn(self, flows: dict[str, Tensor], samples: float) -> tuple[float | None, Tensor | None]:
        step_size = self._step_size(self.updates)
        rates = {}
        for name, table in self.circuit.structure.tables.items():
            parameters = self.circuit.tables[name]
            rates[name] = (mass(table, flows[name]) > 0).to(parameters.dtype) * step_size
            mix(
                self.circuit,
                name,
                from_statistics(table, flows[name], parameters, self.pseudocount),
                step_size,
            )
        return step_size, node_rates(self.circuit, rates)


class OnlineEM(LearningRule):
    """EM on a moving average of the flows per sample, instead of on parameters.

    Args:
        circuit: learnt in place.
        step_size: gamma_k in (0, 1], or a schedule; None: (k + 1)^-0.6 after k updates.
        pseudocount: of each node, relative to the flows of one sample.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self, circuit: Circuit, step_size: float | Schedule | None = None, pseudocount: float = 1e-6
    ) -> None:
        super().__init__(circuit, pseudocount)
        self._step_size = scheduled(power_decay() if step_size is None else step_size)
        self._averages: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Everything but the circuit's parameters."""
        averages = {name: tensor.clone() for name, tensor in self._averages.items()}
        return {**super().state_dict(), "averages": averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: if it is the state of another rule or another circuit.
        """
        super().load_state_dict(state)
        self._averages = self._moved("averages", state["averages"])

    def _learn(self, flows: dict[str, Tensor], samples: float) -> tuple[float | None, Tensor | None]:
        step_size = self._step_size(self.updates)
        if not self._averages:
            # Before the first update the model's own expectation stands for what was seen.
            self._averages = self.circuit.top_down()
        rates = {}
        for name, table in self.circuit.structure.tables.items():
            average, parameters = self._averages[name], self.circuit.tables[name]
            share = mass(table, flows[name]).mul(step_size / samples)
            # s <- (1 - gamma) s + gamma F / M
            average.mul_(1 - step_size).add_(flows[name], alpha=step_size / samples)
            rates[name] = _ratio(share, mass(table, average))
            flows[name].copy_(average)
            parameters.copy_(from_statistics(table, flows[name], parameters, self.pseudocount))
        return step_size, node_rates(self.circuit, rates)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole`, 0 where both are."""
    return part / torch.where(whole > 0, whole, torch.ones_like(whole))
