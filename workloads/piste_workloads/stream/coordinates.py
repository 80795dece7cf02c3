"""An adapter beside itself in other coordinates of its prompt: does it matter how parameters are written?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from piste_algorithms.adaptation import RewrittenPrompt, StepInfo
from piste_algorithms.adaptation.adapter import Adapter, PromptedModel


class Twin(Adapter):
    """Two adapters of the same kind that see the same batches, one with its prompt rewritten, in float64.

    It predicts, and reports steps, as the one whose prompt is not rewritten.

    Attributes:
        differences: What came apart so far: `prompt`, the largest distance of the two prompts over how far
            the plain one was from the first prompt; `prediction`, the largest difference of a probability.

    Args:
        model: `model(x, prompt) -> (batch, classes)` logits in float64.
        start: The first prompt, float64.
        build: Makes the adapter of a model and its first prompt.
        condition: The condition number of the other coordinates, at least 1.
    """

    def __init__(
        self,
        model: PromptedModel,
        start: Tensor,
        build: Callable[[PromptedModel, Tensor], Adapter],
        condition: float,
    ) -> None:
        def exact(x: Tensor, prompt: Tensor) -> Tensor:
            return model(x.double(), prompt)

        super().__init__(exact, start, "entropy")
        self._coordinates = RewrittenPrompt(exact, start, condition, torch.Generator().manual_seed(0))
        self._plain = build(exact, start)
        self._rewritten = build(self._coordinates, self._coordinates.initial())
        self._start = start
        self.differences = {"prompt": 0.0, "prediction": 0.0}

    def fit_source(self, x: Tensor) -> None:
        """Both learn the source."""
        self._plain.fit_source(x)
        self._rewritten.fit_source(x)
        self.prompt = self._plain.prompt

    def adapt(self, batch: Tensor) -> StepInfo:
        """Both take a step; what it did to the plain one."""
        info = self._plain.adapt(batch)
        self._rewritten.adapt(batch)
        self.prompt = self._plain.prompt
        gap = float((self.prompt - self._coordinates.prompt(self._rewritten.prompt)).norm())
        moved = float((self.prompt - self._start).norm())
        # |theta - theta'| / |theta - theta_0|
        self._keep("prompt", 0.0 if gap == 0.0 else gap / moved if moved > 0.0 else math.inf)
        return info

    def predict(self, x: Tensor) -> Tensor:
        """The logits of the plain one."""
        logits = self._plain.predict(x)
        gap = (logits.softmax(-1) - self._rewritten.predict(x).softmax(-1)).abs().max()
        self._keep("prediction", float(gap))
        return logits

    def reset(self) -> None:
        """The first prompt again, of both."""
        self._plain.reset()
        self._rewritten.reset()
        self.prompt = self._plain.prompt

    def state_dict(self) -> dict[str, Any]:
        """Both states, and how far they came apart."""
        return {
            "plain": self._plain.state_dict(),
            "rewritten": self._rewritten.state_dict(),
            "differences": dict(self.differences),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, bit for bit."""
        self._plain.load_state_dict(state_dict["plain"])
        self._rewritten.load_state_dict(state_dict["rewritten"])
        self.prompt = self._plain.prompt
        self.differences = dict(state_dict["differences"])

    def _keep(self, name: str, value: float) -> None:
        """The larger one; what is no number is infinitely far."""
        self.differences[name] = max(self.differences[name], math.inf if math.isnan(value) else value)
