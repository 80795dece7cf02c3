"""What adaptation without labels minimises, as a function of a batch's log-probabilities.

With the entropy `H(x) = -sum_y p(y | x) log p(y | x)`::

    entropy                    mean_x H(x)
    information_maximization   mean_x H(x) + KL(mean_x p(. | x) || prior)     prior: the source's mean
    entropy_matching           mean_x (H(x) - H*(x))^2 / 2                       H*: see `EntropyMatch`

Sources: entropy minimisation, TENT (Wang et al., ICLR 2021, arXiv:2006.10726); information maximisation, SHOT
(Liang et al., ICML 2020, arXiv:2002.08546), here with the source's prior in place of the uniform one;
matching of entropies, POEM (Bar, Shaer, Romano, NeurIPS 2024, arXiv:2408.07511).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# POEM's constants.
_LARGEST_BET = 1.80
_BETTING_RATE = 1 / (8 * math.sqrt(3))


def entropies(log_probabilities: Tensor) -> Tensor:
    """`(batch,)` entropies in nats of `(batch, classes)` log-probabilities."""
    probabilities = log_probabilities.exp()
    # 0 log 0 = 0
    terms = (probabilities * log_probabilities).masked_fill(probabilities == 0, 0.0)
    return -terms.sum(-1)


class Objective:
    """Entropy, the plainest one, and the base of the others.

    `fit` is called once with the source's log-probabilities, `begin` with each batch's before its step; then
    the objective itself may be called any number of times for that batch.
    """

    def fit(self, log_probabilities: Tensor) -> None:
        """Learn from the source's `(n, classes)`."""

    def begin(self, log_probabilities: Tensor) -> None:
        """Look at a batch before its step."""

    def __call__(self, log_probabilities: Tensor) -> Tensor:
        """The loss of a batch, a scalar."""
        # mean_x H(x)
        return entropies(log_probabilities).mean()

    def state_dict(self) -> dict[str, Any]:
        """What was learnt: tensors and numbers."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


class InformationMaximization(Objective):
    """Confident predictions whose mean is the source's."""

    def __init__(self) -> None:
        self._log_prior = torch.empty(0)

    def fit(self, log_probabilities: Tensor) -> None:
        """The prior is the source's mean prediction."""
        self._log_prior = log_probabilities.exp().mean(0).log()

    def __call__(self, log_probabilities: Tensor) -> Tensor:
        """The loss of a batch, a scalar."""
        mean = log_probabilities.exp().mean(0)
        # KL(mean_x p || prior)
        divergence = -entropies(mean.log()[None])[0] - (mean * self._log_prior).sum()
        # mean_x H(x) + KL(mean_x p || prior)
        return super().__call__(log_probabilities) + divergence

    def state_dict(self) -> dict[str, Any]:
        """The prior."""
        return {"log_prior": self._log_prior.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._log_prior = state_dict["log_prior"].clone()


class EntropyMatch(Objective):
    """Entropies as the source's would be, where a betting martingale says that they are not.

    With the source's distribution function F of entropies, for one input after the other::

        u = F(H(x)),  T(u) = u + eps (u^2 - u) / 2,  H*(x) = F^-1(T(u)),  bet 1 + eps (u - 1/2)
        eps <- clip(eps - rate g / sqrt(sum g^2), -1.8, 1.8),  g = -(u - 1/2) / (1 + eps (u - 1/2))

    T is the distribution function that the bet believes u to have; it is the identity while eps is 0.
    """

    def __init__(self) -> None:
        self._sorted = torch.empty(0)
        self._targets = torch.empty(0)
        self.bet = 0.0  # eps
        self._squares = 0.0

    def fit(self, log_probabilities: Tensor) -> None:
        """F is that of the source's entropies."""
        self._sorted = entropies(log_probabilities).sort().values
        self.bet = self._squares = 0.0

    def begin(self, log_probabilities: Tensor) -> None:
        """Set the batch's targets, and bet on its entropies."""
        now = entropies(log_probabilities.detach())
        # u = F(H), between 0 and 1
        ranks = torch.searchsorted(self._sorted, now.contiguous(), right=True)
        believed = []
        for u in (ranks.double() / len(self._sorted)).tolist():
            # T(u) = u + eps (u^2 - u) / 2
            believed.append(u + self.bet * (u * u - u) / 2)
            # g = -(u - 1/2) / (1 + eps (u - 1/2))
            slope = -(u - 0.5) / (1 + self.bet * (u - 0.5))
            self._squares += slope * slope
            if self._squares > 0.0:
                moved = self.bet - _BETTING_RATE * slope / math.sqrt(self._squares)
                self.bet = min(_LARGEST_BET, max(-_LARGEST_BET, moved))
        # H* = F^-1(T(u))
        self._targets = torch.quantile(self._sorted, torch.tensor(believed).to(self._sorted))

    def __call__(self, log_probabilities: Tensor) -> Tensor:
        """The loss of a batch, a scalar."""
        # mean_x (H(x) - H*(x))^2 / 2
        return 0.5 * (entropies(log_probabilities) - self._targets).square().mean()

    def state_dict(self) -> dict[str, Any]:
        """The source's entropies and the bet."""
        return {"sorted": self._sorted.clone(), "bet": self.bet, "squares": self._squares}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._sorted = state_dict["sorted"].clone()
        self.bet, self._squares = state_dict["bet"], state_dict["squares"]


OBJECTIVES: dict[str, type[Objective]] = {
    "information_maximization": InformationMaximization,
    "entropy": Objective,
    "entropy_matching": EntropyMatch,
}


def build_objective(name: str) -> Objective:
    """An objective by its name.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(map(repr, OBJECTIVES))}, got {name!r}")
    return OBJECTIVES[name]()
