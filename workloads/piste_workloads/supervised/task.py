"""What a network is to learn: its examples, its loss and its scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


class Task(ABC):
    """Examples in parts, and what is made of a network's outputs.

    Attributes:
        score: The most telling of its scores, which the pictures show.
        sizes: How many examples each part has: `train`, and where there are such `valid` and `test`.
        kept: What a checkpoint holds beside the model, so that it can be used without the data.
    """

    score: ClassVar[str] = "accuracy"
    sizes: Mapping[str, int]
    kept: Mapping[str, Any]

    @abstractmethod
    def examples(self, part: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some examples as they are, on the device.

        Args:
            part: One of `sizes`.
            indices: `(n,)` int64, on the CPU.
        """

    def batch(self, indices: Tensor, mine: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this worker's share of a training batch; augmented, where a task does that.

        Args:
            indices: `(batch,)` int64, on the CPU: the whole batch, over all workers.
            mine: Places in `indices`: this worker's share. What is drawn at random is drawn for the whole
                batch, so that the batch is the same whatever the number of workers.
            generator: On the device, the same one on every worker.
        """
        return self.examples("train", indices[mine])

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What is minimised, a scalar: a mean over examples."""

    @abstractmethod
    def scores(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What is reported of each example, `(n,)` each: `loss` and at least `score`."""
