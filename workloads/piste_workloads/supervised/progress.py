"""What a run has spent and measured so far."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """What has been spent and measured so far; a checkpoint holds it.

    Attributes:
        evaluations: Gradients of a batch that were computed.
        seconds: Of this worker in training steps, by the clock.
        cpu_seconds: Of this worker in training steps, over all its threads.
        epoch_evaluations: As `evaluations`, in this epoch.
        epoch_seconds: As `seconds`, in this epoch.
        epoch_cpu_seconds: As `cpu_seconds`, in this epoch.
        rows: One for each epoch that has ended: what the pictures show.
    """

    evaluations: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    epoch_evaluations: int = 0
    epoch_seconds: float = 0.0
    epoch_cpu_seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)

    def spend(self, evaluations: int, seconds: float, cpu_seconds: float) -> None:
        """Adds a step."""
        self.evaluations += evaluations
        self.epoch_evaluations += evaluations
        self.seconds += seconds
        self.epoch_seconds += seconds
        self.cpu_seconds += cpu_seconds
        self.epoch_cpu_seconds += cpu_seconds

    def end_epoch(self, steps: int) -> dict[str, float]:
        """The metrics of an epoch of so many steps that has ended."""
        metrics = {
            "cost/gradient_evaluations": float(self.evaluations),
            "cost/gradient_evaluations_per_step": self.epoch_evaluations / steps,
            "time/epoch_s": self.epoch_seconds,
            "time/epoch_cpu_s": self.epoch_cpu_seconds,
            "time/cpu_s": self.cpu_seconds,
        }
        self.epoch_evaluations, self.epoch_seconds, self.epoch_cpu_seconds = 0, 0.0, 0.0
        return metrics
