"""Adam on a circuit's parameters: what gradient training of circuits is.

Rows of weights and categories are softmaxes of logits, normal densities a mean and a logarithm of the
variance. The gradients of the mean log-likelihood of M samples follow from the flows:

    theta[n] = softmax(w[n])         dL/dw[n, c] = (F[n, c] - F_n theta[n, c]) / M
    N(m, s)                          dL/dm = (S_1 - m S_0) / (s M),   with S = sum F_n (1, x, x^2)
                                     dL/dlog s = ((S_2 - 2 m S_1 + m^2 S_0) / s - S_0) / (2 M)

A parameter that is zero stays zero. Source: Kingma and Ba (arXiv:1412.6980), as the gradient baseline of Liu
et al., "Rethinking probabilistic circuit parameter learning" (2025), whose experiments use lr 5e-3 and betas
(0.9, 0.99).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from piste_algorithms._checks import check_betas, check_range
from piste_algorithms.circuits.circuit import Circuit
from piste_algorithms.circuits.rules import LearningRule
from piste_algorithms.circuits.structure import Table
from piste_algorithms.circuits.tables import MAXIMUM_VARIANCE, MINIMUM_VARIANCE, mass


class AdamCircuit(LearningRule):
    """`torch.optim.Adam` on logits, with the analytic gradient.

    Between updates the parameters belong to the rule: what `set_parameters` changes is lost at the next one.

    Args:
        circuit: learnt in place.
        lr: learning rate, positive, or a schedule: number of updates so far -> learning rate.
        betas: Adam's betas, each in [0, 1).

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        circuit: Circuit,
        lr: float | Callable[[int], float] = 5e-3,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        super().__init__(circuit)
        check_betas("betas", betas)
        if not callable(lr):
            check_range("lr", lr, low=0.0, low_open=True)
        self._lr = lr
        self._free = {
            name: _free(circuit.structure.tables[name], table).requires_grad_()
            for name, table in circuit.tables.items()
        }
        self._adam = torch.optim.Adam(list(self._free.values()), lr=1.0, betas=betas)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the circuit's parameters, and the logits, which those give up to rounding only."""
        free = {name: tensor.detach().clone() for name, tensor in self._free.items()}
        return {**super().state_dict(), "free": free, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: if it is the state of another rule or another circuit.
        """
        super().load_state_dict(state)
        for name, tensor in self._free.items():
            known = state["free"].get(name)
            if known is None or known.shape != tensor.shape:
                raise ValueError(f"free[{name!r}] must be of shape {tuple(tensor.shape)}, as in the circuit")
            tensor.detach().copy_(known)
        self._adam.load_state_dict(state["adam"])

    def _learn(self, flows: dict[str, Tensor], samples: float) -> tuple[float | None, Tensor | None]:
        lr = self._lr(self.updates) if callable(self._lr) else self._lr
        check_range("lr", lr, low=0.0, low_open=True)
        self._adam.param_groups[0]["lr"] = float(lr)
        for name, table in self.circuit.structure.tables.items():
            gradient = _gradient(table, flows[name], self.circuit.tables[name])
            self._free[name].grad = gradient.mul_(-1 / samples)
        self._adam.step()
        for name, table in self.circuit.structure.tables.items():
            self.circuit.tables[name].copy_(_bound(table, self._free[name].detach()))
        return float(lr), None


def _free(table: Table, parameters: Tensor) -> Tensor:
    if table.kind == "gaussian":
        return torch.stack((parameters[..., 0], parameters[..., 1].log()), -1)
    return parameters.log()


def _bound(table: Table, free: Tensor) -> Tensor:
    if table.kind == "gaussian":
        variance = free[..., 1].exp().clamp(MINIMUM_VARIANCE, MAXIMUM_VARIANCE)
        return torch.stack((free[..., 0], variance), -1)
    return free.softmax(-1)


def _gradient(table: Table, flows: Tensor, parameters: Tensor) -> Tensor:
    """Of the sum of log-likelihoods in the free parameters; may overwrite `flows`."""
    if table.kind == "gaussian":
        count, first, second = flows.unbind(-1)
        mean, variance = parameters.unbind(-1)
        # dL/dm = (S_1 - m S_0) / s,   dL/dlog s = ((S_2 - 2 m S_1 + m^2 S_0) / s - S_0) / 2
        spread = second - 2 * mean * first + mean.square() * count
        return torch.stack(((first - mean * count) / variance, (spread / variance - count) / 2), -1)
    # dL/dw = F - F_n theta
    return flows.addcmul_(mass(table, flows)[..., None], parameters, value=-1)
