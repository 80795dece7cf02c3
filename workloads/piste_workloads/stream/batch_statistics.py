"""An adapter that normalises by each batch's own statistics once it has adapted, as TENT does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from piste_algorithms.adaptation import NormalizationPrompt, StepInfo
from piste_algorithms.adaptation.adapter import Adapter


class OnceAdapted(Adapter):
    """The classifier as it is until a step of an adapter is accepted, then that adapter.

    Args:
        network: The classifier, with normalisation layers.
        adapter: What follows; its model may predict otherwise with its first prompt.
    """

    def __init__(self, network: nn.Module, adapter: Adapter) -> None:
        source = NormalizationPrompt(network)
        super().__init__(source, source.initial(), "entropy")
        self._adapter = adapter
        self._begun = False

    def fit_source(self, x: Tensor) -> None:
        """The adapter learns the source."""
        self._adapter.fit_source(x)

    def adapt(self, batch: Tensor) -> StepInfo:
        """A step of the adapter."""
        info = self._adapter.adapt(batch)
        self._begun = self._begun or info.accepted
        self.prompt = self._adapter.prompt
        return info

    def predict(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)`."""
        if self._begun:
            return self._adapter.predict(x)
        with torch.no_grad():
            return self.model(x, self._initial)

    def reset(self) -> None:
        """The classifier again."""
        self._adapter.reset()
        self.prompt = self._adapter.prompt
        self._begun = False

    def state_dict(self) -> dict[str, Any]:
        """The adapter's state, and whether it has begun."""
        return {"adapter": self._adapter.state_dict(), "begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, bit for bit."""
        self._adapter.load_state_dict(state_dict["adapter"])
        self.prompt = self._adapter.prompt
        self._begun = state_dict["begun"]
