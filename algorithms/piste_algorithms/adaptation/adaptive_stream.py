"""A stream of batches that is left alone until a detector finds a shift, and adapted after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from piste_algorithms._checks import check_integer
from piste_algorithms.adaptation.adapter import Adapter, StepInfo
from piste_algorithms.martingales.detector import Alarm, Detector


class AdaptiveStream:
    """Scores each batch, adapts for some batches after an alarm, and predicts.

    While there was no alarm the prompt is untouched, so that predictions are the source's to the last bit.
    The score must be one of the source model, not of the adapted one (`FisherScore` keeps a frozen copy): the
    detector's rate holds for what adaptation cannot change. It goes on measuring the stream against the
    source, so while a shift lasts it raises further alarms, each of which prolongs adaptation; silence means
    that the source is back.

    Attributes:
        alarms: all alarms, in their order.
        steps_taken: what the steps of adaptation to the last batch did; none where it was not adapted to.
        adapted: whether the prompt may differ from the first one.

    Args:
        detector: a calibrated detector.
        adapter: an adapter whose source is fitted.
        score: inputs `(batch, ...)` to scores `(batch,)`.
        steps: batches that are adapted to after an alarm, at least 1.
        repeats: steps of the adapter on each of them, at least 1.
        return_after: events without an alarm, after the last step, upon which the first prompt is restored,
            at least 1; None: never.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        detector: Detector,
        adapter: Adapter,
        score: Callable[[Tensor], Tensor],
        *,
        steps: int = 25,
        repeats: int = 1,
        return_after: int | None = None,
    ) -> None:
        check_integer("steps", steps, low=1)
        check_integer("repeats", repeats, low=1)
        if return_after is not None:
            check_integer("return_after", return_after, low=1)
        self.detector = detector
        self.adapter = adapter
        self.score = score
        self.steps = steps
        self.repeats = repeats
        self.return_after = return_after
        self.alarms: list[Alarm] = []
        self.steps_taken: list[StepInfo] = []
        self.adapted = False
        self._remaining = 0
        self._quiet = 0

    def process(self, batch: Tensor) -> Tensor:
        """Take one batch.

        Args:
            batch: `(batch, ...)`, inputs in the order of their events.

        Returns:
            Logits `(batch, classes)`, of the prompt adapted to this batch where it is adapted.

        Raises:
            RuntimeError: if the detector is not calibrated or the adapter's source not fitted.
        """
        found = self.detector.update_many(self.score(batch))
        self.alarms.extend(found)
        self.steps_taken = []
        if found:
            self._remaining = self.steps
        if self._remaining > 0:
            self._remaining -= 1
            self._quiet = 0
            self.steps_taken = [self.adapter.adapt(batch) for _ in range(self.repeats)]
            self.adapted = self.adapted or any(info.accepted for info in self.steps_taken)
        elif self.adapted and self.return_after is not None:
            self._quiet += len(batch)
            if self._quiet >= self.return_after:
                self.adapter.reset()
                self.adapted = False
        return self.adapter.predict(batch)

    def state_dict(self) -> dict[str, Any]:
        """The states of detector and adapter and of what is between them; `alarms` are not kept."""
        return {
            "detector": self.detector.state_dict(),
            "adapter": self.adapter.state_dict(),
            "adapted": self.adapted,
            "remaining": self._remaining,
            "quiet": self._quiet,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, bit for bit."""
        self.detector.load_state_dict(state_dict["detector"])
        self.adapter.load_state_dict(state_dict["adapter"])
        self.adapted = state_dict["adapted"]
        self._remaining, self._quiet = state_dict["remaining"], state_dict["quiet"]
