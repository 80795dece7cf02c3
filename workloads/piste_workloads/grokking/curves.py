"""How accuracies went with the epochs, and what is read off them: when it grokked, and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Curves:
    """Accuracies after some epochs.

    Attributes:
        epochs: Which, ascending.
        train: The share of that epoch's training points that were right when their batch's turn came.
        validation: The share of the validation points that are right after it.
        seconds: What all epochs up to it took, evaluation left out.
    """

    epochs: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, epoch: int, train: float, validation: float, seconds: float) -> None:
        """Adds an epoch behind the last one."""
        self.epochs.append(epoch)
        self.train.append(train)
        self.validation.append(validation)
        self.seconds.append(seconds)

    def reached(self, target: float) -> int | None:
        """The first epoch with that validation accuracy."""
        found = _first(self.validation, target)
        return None if found is None else self.epochs[found]

    def state(self) -> dict[str, Any]:
        """What `Curves(**state)` takes."""
        return {name: list(values) for name, values in vars(self).items()}

    def grokking(self, target: float) -> dict[str, float]:
        """The numbers of the whole.

        Returns:
            - `grok/reached`: 1 where the validation accuracy has reached the target, else 0;
            - `grok/epochs_to_95` (for a target of 0.95): the first epoch where it has; where it has not, the
              last one, which the true number is above;
            - `grok/plateau_epochs`: that less the first epoch where the training accuracy has reached the
              target, at least 0; 0 where it has not: nothing was memorised that could be generalised late;
            - `time/seconds_to_95`: the seconds up to the epoch of the second number.
        """
        found = _first(self.validation, target)
        end = len(self.epochs) - 1 if found is None else found
        memorised = _first(self.train, target)
        plateau = 0 if memorised is None else max(0, self.epochs[end] - self.epochs[memorised])
        return {
            "grok/reached": float(found is not None),
            epochs_key(target): float(self.epochs[end]),
            "grok/plateau_epochs": float(plateau),
            f"time/seconds_to_{_percent(target)}": self.seconds[end],
        }

    def picture(self, title: str, target: float) -> Figure:
        """Training and validation accuracy against epochs, on a logarithmic axis."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axis = figure.add_subplot()
        axis.semilogx(self.epochs, self.train, color="tab:gray", label="training")
        axis.semilogx(self.epochs, self.validation, color="tab:blue", label="validation")
        axis.axhline(target, color="black", linewidth=0.6, linestyle=":")
        if (epoch := self.reached(target)) is not None:
            axis.axvline(epoch, color="tab:blue", linewidth=0.6, linestyle=":")
        axis.set(xlabel="epoch", ylabel="accuracy", ylim=(-0.02, 1.02), title=title)
        figure.legend(frameon=False, loc="outside lower center", ncols=2)
        return figure


def epochs_key(target: float) -> str:
    """The metric of the epochs up to a validation accuracy: `grok/epochs_to_95` for 0.95."""
    return f"grok/epochs_to_{_percent(target)}"


def _percent(target: float) -> str:
    return f"{100.0 * target:g}"


def _first(accuracies: Sequence[float], target: float) -> int | None:
    return next((index for index, accuracy in enumerate(accuracies) if accuracy >= target), None)
