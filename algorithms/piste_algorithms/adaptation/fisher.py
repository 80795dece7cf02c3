"""The Fisher information of a prompt in a classifier's own predictions.

    F = mean_x sum_y p(y | x) (d log p(y | x) / d prompt) (d log p(y | x) / d prompt)^T

It is the second derivative of the predictions' KL divergence, and it transforms with the prompt's
coordinates. It is not the outer product of the loss's gradients (the "empirical Fisher"), which has neither
property (Kunstner, Balles and Hennig, NeurIPS 2019, arXiv:1905.12558).

With `1 / classes` in place of the first `p(y | x)`, labels are even. That matrix transforms alike, and it
does not vanish where predictions are confident: it tells how far the logits move.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from piste_algorithms.adaptation.adapter import PromptedModel


def fisher_factor(
    model: PromptedModel,
    prompt: Tensor,
    x: Tensor,
    *,
    draws: int | None = None,
    generator: torch.Generator | None = None,
    chunk: int = 64,
    even: bool = False,
) -> Tensor:
    """Rows R with R^T R = F; exact, or with labels drawn where classes are many.

    Args:
        model: `model(x, prompt) -> (batch, classes)` logits; inputs of a batch must not depend on one
            another.
        prompt: where, of d entries.
        x: `(batch, ...)`.
        draws: labels drawn for an input, unbiased; None: all classes, exact.
        generator: draws them, on the device of `x`.
        chunk: inputs at a time.
        even: whether labels are even, in place of predicted.

    Returns:
        `(batch * classes, d)`, or `(batch * draws, d)`, float64.
    """
    if draws is None:

        def weighted(theta: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
            log_probabilities = model(one[None], theta)[0].double().log_softmax(-1)
            return log_probabilities, log_probabilities

        with sdpa_kernel(SDPBackend.MATH):  # the attention that vmap takes
            slopes, log_probabilities = vmap(
                jacrev(weighted, has_aux=True), in_dims=(None, 0), chunk_size=chunk
            )(prompt, x)
        # sqrt(p(y | x) / batch) d log p(y | x), or with 1 / classes for p(y | x)
        weights = torch.full_like(log_probabilities, log_probabilities.shape[-1] ** -0.5)
        roots = (weights if even else (0.5 * log_probabilities).exp()) / len(x) ** 0.5
        rows: Tensor = roots.flatten()[:, None] * slopes.reshape(roots.numel(), -1)
        return rows.detach()

    with torch.no_grad():
        probabilities = model(x, prompt).double().softmax(-1)
    chances = torch.ones_like(probabilities) if even else probabilities
    labels = torch.multinomial(chances, draws, replacement=True, generator=generator)

    def drawn(theta: Tensor, one: Tensor, label: Tensor) -> Tensor:
        # An index by a mask, which vmap takes where it takes no lookup.
        return (model(one[None], theta)[0].double().log_softmax(-1) * label).sum(-1)

    marks = torch.nn.functional.one_hot(labels, probabilities.shape[-1]).double()
    with sdpa_kernel(SDPBackend.MATH):
        slopes = vmap(jacrev(drawn), in_dims=(None, 0, 0), chunk_size=chunk)(prompt, x, marks)
    # sqrt(1 / (batch draws)) d log p(y | x)
    scaled: Tensor = slopes.double().reshape(labels.numel(), -1) / labels.numel() ** 0.5
    return scaled.detach()


def compressed(*factors: Tensor) -> Tensor:
    """`(d, d)` or fewer rows R with R^T R the sum of those of factors `(rows, d)`."""
    triangle: Tensor = torch.linalg.qr(torch.cat(factors), mode="r").R
    return triangle


def informs(size: int, precision: float) -> bool:
    """Whether any direction of a matrix of that size can be told from one without information."""
    return _tolerance(size, precision) < 1.0


def _tolerance(size: int, precision: float) -> float:
    return 10 * size * precision


def solve_factored(factor: Tensor, vector: Tensor, precision: float) -> Tensor:
    """Solve `R^T R s = vector` by the singular values of R, whose condition is the root of that of R^T R.

    Columns are scaled to length one. Directions without information, whose singular values are below ten
    times the rank tolerance `d precision`, are left alone.

    Args:
        factor: R, `(rows, d)` float64.
        vector: `(d,)` float64.
        precision: the machine precision of what R was computed in.
    """
    lengths = factor.norm(dim=0)
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)
    _, values, directions = torch.linalg.svd(factor * scale, full_matrices=False)
    informed = values > _tolerance(factor.shape[1], precision) * values[0]
    # R D = U S V^T, D R^T R D z = D g, s = D z:  s = D V S^-2 V^T D g
    weights = torch.where(informed, 1 / values.square(), 0.0)
    solution: Tensor = scale * (directions.T @ (weights * (directions @ (scale * vector))))
    return solution
