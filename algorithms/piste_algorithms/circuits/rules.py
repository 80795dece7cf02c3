"""What all learning rules of circuits share: flows are gathered from batches, then an update follows.

`step(batch)` is `accumulate(batch)` and then `update()`. Flows add up, so several workers learn as one when
each gathers its own rows and all sum what they gathered before the update::

    rule.accumulate(own_rows)                        # or nothing at all, for a worker without rows
    for tensor in rule.accumulated().values():       # the same names in the same order everywhere
        total = tensor.contiguous()                  # NCCL takes no other; flows of categories are transposed
        torch.distributed.all_reduce(total)
        tensor.copy_(total)                          # into what the rule holds
    info = rule.update()                             # the same update everywhere

`accumulate` and `update` also learn from a data set that is read in parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piste_algorithms._checks import check_range
from piste_algorithms.circuits.circuit import Circuit
from piste_algorithms.circuits.schedules import Schedule, check_step_size
from piste_algorithms.circuits.tables import from_moments, moments

TOTALS = "totals"


@dataclass(frozen=True)
class StepInfo:
    """What a step did.

    Attributes:
        log_likelihood: mean over the samples of positive probability, in nats, under the parameters before
            the update.
        samples: how many samples of positive probability the flows are of.
        impossible: how many samples had probability zero; they teach nothing.
        updated: whether the parameters were updated; False where a rule gathers several batches first.
        step_size: the step size or learning rate of this update, or None.
        rate_min: least implicit learning rate of a node: how far its row went towards what the flows alone
            say; None where no update was made or a rule has none.
        rate_mean: mean over all nodes.
        rate_max: largest.
    """

    log_likelihood: float
    samples: int
    impossible: int
    updated: bool = False
    step_size: float | None = None
    rate_min: float | None = None
    rate_mean: float | None = None
    rate_max: float | None = None


class LearningRule:
    """Base of the learning rules; a rule defines `_learn`.

    A parameter that is zero stays zero.

    Args:
        circuit: the circuit whose parameters are learnt, in place.
        pseudocount: see the rule, at least 0.

    Raises:
        ValueError: if an argument is outside its range.
    """

    updates_every: int = 1

    def __init__(self, circuit: Circuit, pseudocount: float = 0.0) -> None:
        if not isinstance(circuit, Circuit):
            raise ValueError(f"circuit must be a Circuit, got {type(circuit).__name__}")
        check_range("pseudocount", pseudocount, low=0.0)
        self.circuit = circuit
        self.pseudocount = float(pseudocount)
        self.updates = 0
        self._gathered: dict[str, Tensor] | None = None
        self._batches = 0

    def step(self, batch: Tensor) -> StepInfo:
        """Gather the flows of a batch `(batch, variables)`, and update unless the rule gathers more first.

        Raises:
            ValueError: as `accumulate` and `update`.
        """
        log_likelihood = self.accumulate(batch)
        if self._batches >= self.updates_every:
            return self.update()
        possible = torch.isfinite(log_likelihood)
        count = int(possible.sum())
        mean = float(log_likelihood[possible].double().mean()) if count else -torch.inf
        return StepInfo(mean, count, len(batch) - count)

    def accumulate(self, batch: Tensor) -> Tensor:
        """Add the flows of a batch to what is gathered.

        Returns:
            Log-likelihood of each row, `(batch,)`.

        Raises:
            ValueError: if the batch is empty or no data for the circuit; nothing is gathered then.
        """
        log_likelihood, flows = self.circuit.flows(batch)
        possible = torch.isfinite(log_likelihood)
        count = possible.sum()
        total = log_likelihood.double().masked_fill(~possible, 0.0).sum()
        totals = torch.stack((count.double(), total, (len(batch) - count).double()))
        if self._gathered is None:
            self._gathered = {**flows, TOTALS: totals}
        else:
            for name, tensor in self._gathered.items():
                tensor.add_(totals if name == TOTALS else flows[name])
        self._batches += 1
        return log_likelihood

    def accumulated(self) -> dict[str, Tensor]:
        """What is gathered itself, in a fixed order: flows by table, and `totals`; additive over workers.

        `totals` (float64) is (samples, sum of log-likelihoods, samples of probability zero). Zeros where
        nothing is gathered yet.
        """
        if self._gathered is None:
            totals = torch.zeros(3, dtype=torch.float64, device=self.circuit.device)
            self._gathered = {**self.circuit.empty_statistics(), TOTALS: totals}
        return self._gathered

    @torch.no_grad()
    def update(self) -> StepInfo:
        """Update the parameters by what is gathered, and begin anew.

        Raises:
            ValueError: if nothing is gathered, or only samples of probability zero, or a schedule gives a
                step size that is not in (0, 1]; the parameters are as they were.
        """
        flows = dict(self.accumulated())
        samples, total, impossible = flows.pop(TOTALS).tolist()
        self._gathered, self._batches = None, 0
        if samples == 0:
            raise ValueError(
                "update needs samples of positive probability, got "
                f"{int(impossible)} of probability zero and no other"
            )
        step_size, rates = self._learn(flows, samples)
        self.updates += 1
        known: tuple[float, float, float] | tuple[None, None, None] = (None, None, None)
        if rates is not None:
            known = float(rates.min()), float(rates.double().mean()), float(rates.max())
        return StepInfo(total / samples, int(samples), int(impossible), True, step_size, *known)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the circuit's parameters: tensors, numbers and dicts of them."""
        return {
            "rule": type(self).__name__,
            "updates": self.updates,
            "batches": self._batches,
            "gathered": {name: tensor.clone() for name, tensor in (self._gathered or {}).items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit with the same parameters.

        Raises:
            ValueError: if it is the state of another rule or another circuit.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(f"state must hold {', '.join(missing)}, got {', '.join(state)}")
        if state["rule"] != type(self).__name__:
            raise ValueError(f"state must be that of {type(self).__name__}, got that of {state['rule']}")
        gathered = self._moved("gathered", state["gathered"])
        self.updates, self._batches = int(state["updates"]), int(state["batches"])
        self._gathered = gathered or None

    def _learn(self, flows: dict[str, Tensor], samples: float) -> tuple[float | None, Tensor | None]:
        """Update the tables in place, may overwrite `flows`; step size and all nodes' implicit rates."""
        raise NotImplementedError

    def _moved(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the circuit's device in the layout of its statistics, checked."""
        shapes = {key: tensor.shape for key, tensor in self.circuit.empty_statistics().items()}
        copies = self.circuit.empty_statistics() if tensors else {}
        for key, tensor in tensors.items():
            if key == TOTALS:
                copies[key] = tensor.to(self.circuit.device, copy=True)
            elif shapes.get(key) != tensor.shape:
                raise ValueError(
                    f"{name}[{key!r}] must be of shape {shapes.get(key)}, got {tuple(tensor.shape)}"
                )
            else:
                copies[key].copy_(tensor)
        return copies


def scheduled(step_size: float | Schedule) -> Schedule:
    """A number as a constant schedule, checked; a schedule is checked whenever it is asked.

    Raises:
        ValueError: if it is neither a number in (0, 1] nor callable.
    """
    if callable(step_size):
        schedule = step_size
        return lambda update: check_step_size(f"step_size({update})", schedule(update))
    constant = check_step_size("step_size", step_size)
    return lambda update: constant


def node_rates(circuit: Circuit, rates: Mapping[str, Tensor]) -> Tensor:
    """The rates of the nodes of all tables in one vector."""
    return torch.cat([rates[name].flatten() for name in circuit.tables])


def mix(circuit: Circuit, name: str, target: Tensor, step_size: float) -> None:
    """A table's moments a step towards those of `target`, which is overwritten."""
    table, parameters = circuit.structure.tables[name], circuit.tables[name]
    if step_size == 1.0:
        parameters.copy_(target)
        return
    # theta <- (1 - alpha) theta + alpha target
    mixed = torch.lerp(moments(table, parameters), moments(table, target), step_size)
    parameters.copy_(from_moments(table, mixed))
