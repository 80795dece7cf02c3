"""Baselines: a prompt moved by SGD or Adam, with nothing that bounds a step.

`Tent` minimises entropy (Wang et al., ICLR 2021, arXiv:2006.10726), there with the gains of
batch-normalisation layers and their statistics of each batch: that is `NormalizationPrompt(classifier,
batch_statistics=True)`. `EntropyMatching` matches the source's entropies (POEM: Bar, Shaer, Romano, NeurIPS
2024, arXiv:2408.07511) without its schedule of delayed starts and filtered samples.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from piste_algorithms._checks import check_range
from piste_algorithms.adaptation.adapter import Adapter, PromptedModel, StepInfo


class GradientPrompt(Adapter):
    """Steps of SGD or Adam on a prompt.

    Args:
        model: see `Adapter`.
        prompt: see `Adapter`.
        lr: learning rate, above 0.
        optimizer: `"sgd"` or `"adam"`.
        momentum: of SGD, in [0, 1).
        objective: see `Adapter`.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        model: PromptedModel,
        prompt: Tensor,
        lr: float = 0.1,
        optimizer: str = "adam",
        momentum: float = 0.0,
        objective: str = "information_maximization",
    ) -> None:
        check_range("lr", lr, low=0.0, low_open=True)
        check_range("momentum", momentum, low=0.0, high=1.0)
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f'optimizer must be "sgd" or "adam", got {optimizer!r}')
        super().__init__(model, prompt, objective)
        self.lr = float(lr)
        self.optimizer = optimizer
        self.momentum = float(momentum)
        self._optimizer = self._build()

    def reset(self) -> None:
        """The first prompt again, and nothing remembered of the batches since."""
        super().reset()
        self._optimizer = self._build()

    def state_dict(self) -> dict[str, Any]:
        """All that adaptation has changed: tensors, numbers and dicts of them."""
        return {**super().state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, bit for bit."""
        super().load_state_dict(state_dict)
        self._optimizer.load_state_dict(state_dict["optimizer"])

    def _build(self) -> Optimizer:
        self._parameter = nn.Parameter(self.prompt)
        self.prompt = self._parameter.detach()  # the same memory
        if self.optimizer == "sgd":
            return SGD([self._parameter], lr=self.lr, momentum=self.momentum)
        return Adam([self._parameter], lr=self.lr)

    def _step(self, batch: Tensor, log_probabilities: Tensor, loss: float, gradient: Tensor) -> StepInfo:
        self._parameter.grad = gradient
        self._optimizer.step()
        self._parameter.grad = None
        loss_after, kl = self._measure(batch, self.prompt, log_probabilities)
        return StepInfo(True, loss, loss_after, kl, self.lr, 0)


class Tent(GradientPrompt):
    """Minimises the entropy of predictions, with the arguments of `GradientPrompt` up to `momentum`."""

    def __init__(
        self,
        model: PromptedModel,
        prompt: Tensor,
        lr: float = 1e-3,
        optimizer: str = "adam",
        momentum: float = 0.0,
    ) -> None:
        super().__init__(model, prompt, lr, optimizer, momentum, objective="entropy")


class EntropyMatching(GradientPrompt):
    """Matches the source's entropies, with the arguments of `GradientPrompt` up to `momentum`."""

    def __init__(
        self,
        model: PromptedModel,
        prompt: Tensor,
        lr: float = 1e-3,
        optimizer: str = "adam",
        momentum: float = 0.0,
    ) -> None:
        super().__init__(model, prompt, lr, optimizer, momentum, objective="entropy_matching")
