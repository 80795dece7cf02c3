"""What the adapters share: a prompt that alone changes, its source, and an exact state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piste_algorithms.adaptation.objectives import build_objective

PromptedModel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What one step of adaptation did.

    Attributes:
        accepted: whether the prompt has changed.
        loss: the objective before the step; NaN where the batch gave none.
        loss_after: the objective with the prompt as it is now.
        kl: mean KL divergence of the predictions before from those after, in nats, measured on the batch.
        step_size: what the direction was multiplied by, 0 if the prompt has not changed.
        halvings: how often the step was halved until it was accepted, or given up.
    """

    accepted: bool
    loss: float
    loss_after: float
    kl: float
    step_size: float
    halvings: int


class Adapter:
    """The base of the adapters.

    Attributes:
        prompt: the prompt as it is.

    Args:
        model: `model(x, prompt) -> (batch, classes)` logits; see `prompts.py`. Nothing but the prompt is
            changed.
        prompt: the prompt to begin with, floating point.
        objective: `"information_maximization"`, `"entropy"` or `"entropy_matching"`.

    Raises:
        ValueError: if `prompt` is no finite floating-point tensor or there is no such objective.
    """

    def __init__(self, model: PromptedModel, prompt: Tensor, objective: str) -> None:
        if not isinstance(prompt, Tensor) or not prompt.is_floating_point() or prompt.numel() == 0:
            raise ValueError(f"prompt must be a floating-point tensor of at least one entry, got {prompt!r}")
        if not bool(torch.isfinite(prompt).all()):
            raise ValueError("prompt must be finite")
        self.model = model
        self.prompt = prompt.detach().clone()
        self._initial = self.prompt.clone()
        self._objective = build_objective(objective)
        self._fitted = False

    def fit_source(self, x: Tensor) -> None:
        """Learn what the source looks like under the first prompt.

        Args:
            x: `(n, ...)`, inputs of the source.

        Raises:
            ValueError: if `x` holds no input, or the model's logits are not finite on it.
        """
        self.reset()
        with torch.no_grad():
            log_probabilities = self._log_probabilities(_checked(x), self.prompt)
        if not bool(torch.isfinite(log_probabilities.logsumexp(-1)).all()):
            raise ValueError("x must give finite logits")
        self._objective.fit(log_probabilities)
        self._fitted = True

    def predict(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)` with the prompt as it is."""
        with torch.no_grad():
            return self.model(x, self.prompt)

    def adapt(self, batch: Tensor) -> StepInfo:
        """Take one step on a batch without labels.

        A batch whose loss or gradient is not finite changes nothing.

        Args:
            batch: `(batch, ...)`, inputs.

        Returns:
            What the step did.

        Raises:
            ValueError: if the batch is empty.
            RuntimeError: if the source is not fitted.
        """
        if not self._fitted:
            raise RuntimeError(f"{type(self).__name__} knows no source: call fit_source(x) first")
        _checked(batch)
        prompt = self.prompt.detach().clone().requires_grad_()
        with torch.enable_grad():
            log_probabilities = self._log_probabilities(batch, prompt)
            before = self._objective.state_dict()
            if bool(torch.isfinite(log_probabilities.detach().logsumexp(-1)).all()):
                self._objective.begin(log_probabilities.detach())
                loss = self._objective(log_probabilities)
                (gradient,) = torch.autograd.grad(loss, prompt)
                if bool(torch.isfinite(loss) and torch.isfinite(gradient).all()):
                    return self._step(batch, log_probabilities.detach(), float(loss.detach()), gradient)
                self._objective.load_state_dict(before)
        return StepInfo(False, math.nan, math.nan, 0.0, 0.0, 0)

    def reset(self) -> None:
        """The first prompt again, and nothing remembered of the batches since."""
        self.prompt = self._initial.clone()

    def state_dict(self) -> dict[str, Any]:
        """All that adaptation has changed: tensors, numbers and dicts of them."""
        return {
            "prompt": self.prompt.clone(),
            "initial": self._initial.clone(),
            "fitted": self._fitted,
            "objective": self._objective.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, bit for bit."""
        self._initial = state_dict["initial"].clone()
        self.reset()
        self.prompt.copy_(state_dict["prompt"])
        self._fitted = state_dict["fitted"]
        self._objective.load_state_dict(state_dict["objective"])

    def _step(self, batch: Tensor, log_probabilities: Tensor, loss: float, gradient: Tensor) -> StepInfo:
        """Change the prompt; all arguments are finite."""
        raise NotImplementedError

    def _log_probabilities(self, x: Tensor, prompt: Tensor) -> Tensor:
        """`(batch, classes)`, float64."""
        return self.model(x, prompt).double().log_softmax(-1)

    def _measure(self, batch: Tensor, prompt: Tensor, before: Tensor) -> tuple[float, float]:
        """The batch's loss under another prompt, and the mean KL divergence from before."""
        with torch.no_grad():
            after = self._log_probabilities(batch, prompt)
            probabilities = before.exp()
            # KL(p_before || p_after) = mean_x sum_y p (log p - log q), with 0 log 0 = 0
            terms = (probabilities * (before - after)).masked_fill(probabilities == 0, 0.0)
            return float(self._objective(after)), float(terms.sum(-1).mean().clamp_min(0.0))


def _checked(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim == 0 or len(x) == 0:
        raise ValueError("a batch must be a tensor of at least one input")
    return x
