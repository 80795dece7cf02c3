"""What a run has spent and found so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from piste_algorithms.circuits import StepInfo


@dataclass
class Progress:
    """What has been spent and found so far; a checkpoint holds it.

    Attributes:
        updates: Of the parameters.
        rows: That have been learned from, those seen again counted again.
        seconds: Of this worker in updates, by the clock.
        cpu_seconds: Of this worker in updates, over all its threads.
        train: The last epoch's log-likelihood of training rows.
        best: The best validation's log-likelihood.
        best_epoch: Its epoch.
        since: Validations since then.
        curve: A mapping for each validation: what the pictures show.
    """

    updates: int = 0
    rows: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    train: float = -math.inf
    best: float = -math.inf
    best_epoch: int = 0
    since: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)

    def validated(self, epoch: int, log_likelihood: float) -> None:
        """Notes a validation."""
        self.curve.append(
            {
                "epoch": float(epoch),
                "cost/updates": float(self.updates),
                "time/train_s": self.seconds,
                "train/log_likelihood": self.train,
                "valid/log_likelihood": log_likelihood,
            }
        )
        self.since += 1
        if log_likelihood > self.best:
            self.best, self.best_epoch, self.since = log_likelihood, epoch, 0

    def state(self) -> dict[str, Any]:
        """What `Progress(**state)` takes."""
        return asdict(self)


def likelihoods(part: str, log_likelihood: float, observed: float) -> dict[str, float]:
    """The metrics of a mean log-likelihood.

    Args:
        part: `train`, `valid` or `test`.
        log_likelihood: Mean over rows, in nats.
        observed: Mean number of values of a row that are not missing; with 0 there are no bits a dimension.
    """
    return {
        f"{part}/log_likelihood": log_likelihood,
        # bits per dimension = -log p(x) / (D ln 2)
        f"{part}/bits_per_dimension": -log_likelihood / (observed * math.log(2.0)) if observed else math.nan,
        f"{part}/loss": -log_likelihood,
    }


def of_updates(infos: Sequence[StepInfo]) -> dict[str, float]:
    """The metrics of an epoch's updates: step size of the last, implicit learning rates over all of them.

    `rule/rate_min` and `rule/rate_max` are the extremes over nodes and updates, `rule/rate_mean` the mean;
    a rule without such rates has none.
    """
    metrics = {}
    if (step_size := infos[-1].step_size) is not None:
        metrics["rule/step_size"] = step_size
    for name, over in (("min", min), ("mean", lambda values: sum(values) / len(values)), ("max", max)):
        rates = [getattr(info, f"rate_{name}") for info in infos]
        if None not in rates:
            metrics[f"rule/rate_{name}"] = over(rates)
    return metrics
