"""Non-conformity scores of inputs: how strange a classifier's confidence and features are.

With the source's mean prediction `p_bar` and the mean and standard deviation `mu`, `sd` of each of d
features::

    s(x) = KL(p(. | x) || p_bar) + alpha mean_j ((phi_j(x) - mu_j) / sd_j)^2

Source: equation 1 of M-FISHER, the sum of a divergence of the confidence and a distance of the features,
which leaves the distance and the weight open; squared standardised distance and `alpha = 1` are this
project's choice.

The divergence is large where the model is confident, so a shift that costs it confidence lowers that part of
the score. A detector with `two_sided=True` finds it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from piste_algorithms._checks import check_range


class FisherScore:
    """Turns inputs into scores with a frozen copy of the source model, so that adaptation cannot move them.

    A model with a method `features(x)` is measured by these features, any other by its logits.

    Args:
        model: `model(x) -> (batch, classes)` logits; copied, and evaluated in evaluation mode.
        reference: `(n, ...)`, n > 1, inputs of the source; not those that a detector is calibrated with.
        alpha: weight of the features' distance, at least 0.

    Raises:
        ValueError: if `alpha` is outside its range, `reference` holds fewer than two inputs, or the model's
            outputs on it are not finite or do not vary.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], reference: Tensor, alpha: float = 1.0) -> None:
        check_range("alpha", alpha, low=0.0)
        if not isinstance(reference, Tensor) or reference.ndim == 0 or len(reference) < 2:
            raise ValueError("reference must be a tensor of at least two inputs")
        self.alpha = float(alpha)
        self._model = copy.deepcopy(model)
        if isinstance(self._model, nn.Module):
            self._model.eval().requires_grad_(False)
        log_probabilities, features = self._outputs(reference)
        # p_bar = mean_x p(. | x)
        self._log_mean = log_probabilities.exp().mean(0).log()
        self._feature_mean = features.mean(0)
        spread = features.std(0)
        if not bool(torch.isfinite(log_probabilities).all() and torch.isfinite(features).all()):
            raise ValueError("reference must give finite logits and features")
        if not bool((spread > 0).any()):
            raise ValueError("reference must give features that vary")
        # A feature that is still on the source must not make every other input infinitely strange.
        self._feature_scale = spread.clamp_min(1e-3 * float(spread.mean()))

    def __call__(self, x: Tensor) -> Tensor:
        """The scores of inputs.

        Args:
            x: `(batch, ...)`.

        Returns:
            `(batch,)` float64 on the CPU; not finite where the model's outputs are not.
        """
        log_probabilities, features = self._outputs(x)
        # KL(p || p_bar) = sum_y p_y (log p_y - log p_bar_y), with 0 log 0 = 0
        probabilities = log_probabilities.exp()
        terms = probabilities * (log_probabilities - self._log_mean)
        divergence = torch.where(probabilities == 0, torch.zeros_like(terms), terms).sum(-1)
        # mean_j ((phi_j - mu_j) / sd_j)^2
        distance = ((features - self._feature_mean) / self._feature_scale).square().mean(-1)
        return (divergence + self.alpha * distance).cpu()

    def _outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(batch, classes)` log-probabilities and `(batch, d)` features, float64."""
        with torch.no_grad():
            logits = self._model(x).double()
            named = getattr(self._model, "features", None)
            features = named(x).double().flatten(1) if callable(named) else logits
        return logits.log_softmax(-1), features
