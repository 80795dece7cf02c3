"""FisherPrompt: natural-gradient steps of a prompt, each capped in how far it moves the predictions.

For each batch, with the loss L of `objectives.py` and the Fisher information of `fisher.py`::

    g   = dL / dtheta
    F   = 0.9 F + 0.1 F(batch)                                (the first batch: F(batch))
    s   = (F + damping D)^-1 g
    c   = min(step_size, sqrt(2 max_kl / (g^T s)))            predicted KL at most max_kl
    theta <- theta - c s

where c is halved until the measured KL is at most max_kl and the loss has not risen by more than 10 %; where
that does not come about, theta stays as it is.

where D is, of the source under the first prompt,

    predicted   mean_x sum_y p(y | x) (d log p(y | x)) (d log p(y | x))^T     its Fisher information
    even        mean_x mean_y    (d log p(y | x)) (d log p(y | x))^T     labels are even
    identity    trace(F) / d I                                           of the batches, in fact

Fisher information transforms with the prompt's coordinates, and so do the first two: where every direction of
the prompt changes a prediction, steps are the same in any linear coordinates. Damping by a multiple of the
identity is not, nor is plain gradient descent. Where the source's predictions are confident its Fisher
information almost vanishes; directions in which it does are hardly damped, the step goes far in them, and is
halved to next to nothing. Even labels measure how far logits move, which does not vanish.

Directions that change no prediction at all are left alone, which no rule can do alike in all coordinates: so
it is with the gains and shifts of two normalisation layers in a row, where a scale that the first gives the
second can take.

Sources: the Fisher-preconditioned prompt step is M-FISHER's; the natural gradient is Amari's (Neural Comput.
10, 1998). The damping, the running average, the cap on the measured divergence and the roll-back are this
project's choice: the KL that the quadratic model predicts was exceeded by the measured one severalfold. The
published penalty on misaligned confidence is left out: on pseudo-labels, which are the most probable classes,
it has nothing to count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from piste_algorithms._checks import check_integer, check_range
from piste_algorithms.adaptation.adapter import Adapter, PromptedModel, StepInfo
from piste_algorithms.adaptation.fisher import compressed, fisher_factor, informs, solve_factored

LARGEST_FULL = 2048
MANY_CLASSES = 32
DAMPINGS = ("predicted", "even", "identity")
_KEPT = 0.9  # of the running average of F
_MAX_HALVINGS = 12
_TOLERATED_RISE = 0.1  # of the loss


class FisherPrompt(Adapter):
    """Natural-gradient steps of a prompt, capped in the KL divergence that they cause.

    Args:
        model: `model(x, prompt) -> (batch, classes)` logits; inputs of a batch must not depend on one
            another.
        prompt: the prompt to begin with.
        step_size: the largest multiple of the natural gradient, above 0; it needs no tuning to the task.
        damping: multiple of the damping matrix, above 0; for the identity 1e-3 is usual, for the others below
            1 steps may become unstable.
        max_kl: bound of the measured mean KL divergence of a step, in nats, above 0.
        objective: `"information_maximization"`, `"entropy"` or `"entropy_matching"`.
        curvature: `"full"`, for prompts of at most 2,048 entries, or `"diagonal"`, which is cheaper and
            depends on the prompt's coordinates.
        damped_by: `"predicted"`, `"even"`, which takes a `step_size` of 1 and suits confident sources, or
            `"identity"`, with which steps depend on the prompt's coordinates.
        draws: labels drawn for an input where there are more than 32 classes; with fewer the sum is exact.
        seed: of the generator that draws them.

    Raises:
        ValueError: if an argument is outside its range, or a full curvature is too large.
    """

    def __init__(
        self,
        model: PromptedModel,
        prompt: Tensor,
        step_size: float = 0.5,
        damping: float = 1.0,
        max_kl: float = 0.05,
        objective: str = "information_maximization",
        *,
        curvature: str = "full",
        damped_by: str = "predicted",
        draws: int = 4,
        seed: int = 0,
    ) -> None:
        check_range("step_size", step_size, low=0.0, low_open=True)
        check_range("damping", damping, low=0.0, low_open=True)
        check_range("max_kl", max_kl, low=0.0, low_open=True)
        check_integer("draws", draws, low=1)
        check_integer("seed", seed, low=0)
        if curvature not in ("full", "diagonal"):
            raise ValueError(f'curvature must be "full" or "diagonal", got {curvature!r}')
        if damped_by not in DAMPINGS:
            raise ValueError(f"damped_by must be one of {', '.join(map(repr, DAMPINGS))}, got {damped_by!r}")
        super().__init__(model, prompt, objective)
        if curvature == "full" and prompt.numel() > LARGEST_FULL:
            raise ValueError(
                f"prompt must have at most {LARGEST_FULL} entries for full curvature, got {prompt.numel()}: "
                'make it smaller or use curvature="diagonal"'
            )
        precision = torch.finfo(prompt.dtype).eps
        if curvature == "full" and not informs(prompt.numel(), precision):
            raise ValueError(
                f"prompt must be float32 or float64 for full curvature of {prompt.numel()} entries, got "
                f"{prompt.dtype}"
            )
        self.step_size = float(step_size)
        self.damping = float(damping)
        self.max_kl = float(max_kl)
        self.curvature = curvature
        self.damped_by = damped_by
        self._draws = draws
        self._generator = torch.Generator(prompt.device).manual_seed(seed)
        self._source: Tensor | None = None
        self._average: Tensor | None = None

    def fit_source(self, x: Tensor) -> None:
        """Learn the source's predictions and the damping matrix under the first prompt.

        Args:
            x: `(n, ...)`, inputs of the source; the matrix has the full rank only if `n (classes - 1)`
                is at least the number of the prompt's entries.

        Raises:
            ValueError: if `x` holds no input, or the model's logits or their derivatives are not finite on
                it.
        """
        super().fit_source(x)
        source = self._fisher(x, even=self.damped_by == "even")
        if not bool(torch.isfinite(source).all()):
            raise ValueError("x must give logits with finite derivatives")
        self._source = source

    def reset(self) -> None:
        """The first prompt again, and nothing remembered of the batches since."""
        super().reset()
        self._average = None

    def state_dict(self) -> dict[str, Any]:
        """All that adaptation has changed: tensors, numbers and dicts of them."""
        held = {"source": self._source, "average": self._average}
        return {
            **super().state_dict(),
            **{name: None if value is None else value.clone() for name, value in held.items()},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, bit for bit."""
        super().load_state_dict(state_dict)
        self._source, self._average = state_dict["source"], state_dict["average"]
        self._generator.set_state(state_dict["generator"])

    def _step(self, batch: Tensor, log_probabilities: Tensor, loss: float, gradient: Tensor) -> StepInfo:
        now = self._fisher(batch)
        if not bool(torch.isfinite(now).all()):
            return StepInfo(False, loss, loss, 0.0, 0.0, 0)
        # F <- 0.9 F + 0.1 F(batch)
        self._average = now if self._average is None else self._sum((_KEPT, self._average), (1 - _KEPT, now))
        # s = (F + damping D)^-1 g
        damped = self._sum((1.0, self._average), (self.damping, self._damping_matrix(self._average)))
        direction = self._solve(damped, gradient.double().flatten())
        if not bool(direction.any()):  # no direction changes a prediction
            return StepInfo(False, loss, loss, 0.0, 0.0, 0)
        # c = min(step_size, sqrt(2 max_kl / (g^T s)))
        slope = float(gradient.double().flatten() @ direction)
        scale = min(self.step_size, (2 * self.max_kl / slope) ** 0.5) if slope > 0 else self.step_size
        for halvings in range(_MAX_HALVINGS + 1):
            step_size = scale * 0.5**halvings
            # theta - c s
            moved = (self.prompt - (step_size * direction).view_as(self.prompt)).to(self.prompt.dtype)
            loss_after, kl = self._measure(batch, moved, log_probabilities)
            if kl <= self.max_kl and loss_after <= loss + _TOLERATED_RISE * abs(loss):  # false for NaN
                self.prompt.copy_(moved)
                return StepInfo(True, loss, loss_after, kl, step_size, halvings)
        return StepInfo(False, loss, loss, 0.0, 0.0, _MAX_HALVINGS)

    # A matrix M is held as rows R with R^T R = M, and a diagonal one as its diagonal.

    def _damping_matrix(self, average: Tensor) -> Tensor:
        """D."""
        assert self._source is not None  # the source is fitted
        if self.damped_by != "identity":
            return self._source
        # trace(F) / d I
        if self.curvature == "diagonal":
            return torch.full_like(average, float(average.mean()))
        size = average.shape[1]
        root = float(average.square().sum() / size) ** 0.5
        identity: Tensor = root * torch.eye(size, dtype=average.dtype, device=average.device)
        return identity

    def _fisher(self, x: Tensor, even: bool = False) -> Tensor:
        """The Fisher information of some inputs, float64."""
        with torch.no_grad():
            classes = self.model(x[:1], self.prompt).shape[-1]
        draws = self._draws if classes > MANY_CLASSES else None
        rows = fisher_factor(self.model, self.prompt, x, draws=draws, generator=self._generator, even=even)
        if self.curvature == "diagonal":
            return rows.square().sum(0)
        return compressed(rows) if bool(torch.isfinite(rows).all()) else rows

    def _sum(self, *terms: tuple[float, Tensor]) -> Tensor:
        """Of matrices, each with its weight."""
        if self.curvature == "full":
            return compressed(*(weight**0.5 * rows for weight, rows in terms))
        return torch.stack([weight * diagonal for weight, diagonal in terms]).sum(0)

    def _solve(self, curvature: Tensor, gradient: Tensor) -> Tensor:
        if self.curvature == "full":
            return solve_factored(curvature, gradient, torch.finfo(self.prompt.dtype).eps)
        return torch.where(curvature > 0, gradient / curvature, torch.zeros_like(gradient))
