"""The Fisher information of a prompt in a classifier's own predictions.

    F = mean_x sum_y p(y | x) (d log p(y | x) / d prompt) (d log p(y | x) / d prompt)^T

It is the second derivative of the predictions' KL divergence, and it transforms with the prompt's
coordinates. It is not the outer product of the loss's gradients (the "empirical Fisher"), which has neither
property (Kunstner, Balles and Hennig, NeurIPS 2019, arXiv:1905.12558).
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
) -> Tensor:
    """Rows R with R^T R = F; exact, or with labels drawn from the predictions where classes are many.

    Args:
        model: `model(x, prompt) -> (batch, classes)` logits; inputs of a batch must not depend on one
            another.
        prompt: where, of d entries.
        x: `(batch, ...)`.
        draws: labels drawn for an input, unbiased; None: all classes, exact.
        generator: draws them, on the device of `x`.
        chunk: inputs at a time.

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
        # sqrt(p(y | x) / batch) d log p(y | x)
        roots = (0.5 * log_probabilities).exp() / len(x) ** 0.5
        rows: Tensor = roots.flatten()[:, None] * slopes.reshape(roots.numel(), -1)
        return rows.detach()

    with torch.no_grad():
        probabilities = model(x, prompt).double().softmax(-1)
    labels = torch.multinomial(probabilities, draws, replacement=True, generator=generator)

    def drawn(theta: Tensor, one: Tensor, label: Tensor) -> Tensor:
        # An index by a mask, which vmap takes where it takes no lookup.
        return (model(one[None], theta)[0].double().log_softmax(-1) * label).sum(-1)

    marks = torch.nn.functional.one_hot(labels, probabilities.shape[-1]).double()
    with sdpa_kernel(SDPBackend.MATH):
        slopes = vmap(jacrev(drawn), in_dims=(None, 0, 0), chunk_size=chunk)(prompt, x, marks)
    # sqrt(1 / (batch draws)) d log p(y | x)
    scaled: Tensor = slopes.reshape(labels.numel(), -1) / labels.numel() ** 0.5
    return scaled.detach()


def solve_damped(matrix: Tensor, vector: Tensor) -> Tensor:
    """Solve `matrix s = vector` for a positive semidefinite float64 matrix, `(d, d)`.

    The matrix is scaled to a diagonal of ones. Directions without information, below ten times float64's rank
    tolerance `d eps` there, are damped rather than amplified.
    """
    # D M D z = D g, s = D z, with D_ii = M_ii^(-1/2)
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt(), 0.0)
    scaled = scale[:, None] * matrix * scale
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    tolerance = 10 * len(matrix) * torch.finfo(matrix.dtype).eps
    while True:
        lower, failed = torch.linalg.cholesky_ex(scaled + tolerance * identity)
        if not bool(failed):
            return scale * torch.cholesky_solve((scale * vector)[:, None], lower)[:, 0]
        tolerance *= 10  # rounding has made an eigenvalue negative; a diagonal of ones bounds this
