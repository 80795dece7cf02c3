"""EGD: egalitarian gradient descent, which gives all singular directions of a layer's gradient equal speed.

For a layer's gradient `G` of shape `(out, in)` with thin singular value decomposition `G = U S V^T`::

    G <- G + weight_decay W                                (coupled, as published)
    G <- (G G^T)^(-1/2) G = U S^(-1) U^T G = U V^T         (eq. 11; the pseudo-inverse: null directions get 0)

The result goes to any other optimizer, in place of the gradient. Once validation accuracy exceeds a
threshold, whitening is switched off for good and the other optimizer goes on alone (Alg. 1). The Frobenius
norm of `U V^T` is the root of the rank, whatever the size of the gradient, so the learning rate is a step per
singular direction and has to decay for the iterates to come to rest.

Source: Ali Saheb Pasand and Elvis Dohmatob, "Egalitarian Gradient Descent: A Simple Approach to Accelerated
Grokking" (2025), arXiv:2510.04930, Alg. 1 (training), 2 (whitening) and 3 (randomised singular value
decomposition), and its released code. Where they differ:

- Accuracy is that of the validation data, as in the text; the code looks at the test data.
- Singular values below a relative threshold count as zero, as in the text (Remark 2); the code clamps them at
  1e-6 or 1e-9, or not at all.
- Weight decay is in the gradient that is whitened, as in the code of the two-layer networks, where it is part
  of the loss. On MNIST and for the transformer the code leaves it to torch's AdamW and Adam, behind the
  whitening: that is `fold_weight_decay=False`. With a decay of 2.0, as on MNIST, folding leaves little of the
  gradient in its sum with the decay.
- Which matrices are whitened is the caller's choice (`select`). The code whitens the first layer alone in its
  two-layer networks, all layers on MNIST, and both linear maps of each block in the transformer.
- `rsvd` draws a new test matrix at every step; the code draws the same one.
- `colnorm` divides by the norm alone; the code by `max(norm, 0.01)`. In the published modular task
  all rows are shorter than that (p = 97: a median of 0.0034 at most, measured): there it multiplies by 100.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import compress
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from piste_algorithms._checks import check_range
from piste_algorithms.optimizers._wrapping import Wrapper

METHODS = ("eigh", "svd", "rsvd", "newton_schulz", "colnorm")

# Newton-Schulz: X <- a X + b (X X^T) X + c (X X^T)^2 X. Five steps with Muon's coefficients (Jordan et al.,
# 2024) lift singular values from 0.001 to about 0.5 and more, three of the classical ones bring those to 1.
_LIFT = (3.4445, -4.7750, 2.0315)
_SETTLE = (15 / 8, -10 / 8, 3 / 8)
_COEFFICIENTS = (_LIFT,) * 5 + (_SETTLE,) * 3

_POWER_ITERATIONS = 2  # n_iter of Alg. 3

# The last product of `eigh` loses about a fifth of eps times the condition number. Up to this one it is done
# in the dtype of the gradient (an error of 2e-6 in float32), beyond in float64.
_WELL_CONDITIONED = 100.0
_BLOCK_COLUMNS = 128

Select = str | Callable[[str | int, Tensor], bool]


def whiten(
    matrix: Tensor,
    method: str = "eigh",
    rank: int | None = None,
    rcond: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The matrix with all its non-zero singular values replaced by 1: `U V^T` of `U S V^T`.

    The result does not depend on the scale of `matrix`. A matrix of zeros and one with a non-finite entry are
    returned as they are; no other input gives a non-finite result.

    The methods:

    - `eigh`: by the eigenvalues `S^2` of the Gram matrix of the smaller side, in float64. They are exact to
      about `eps` times the largest, so singular values are resolved down to `sqrt(max(m, n) eps)` of the
      largest; what is smaller counts as zero, whatever `rcond`. For a float32 matrix of low rank that is just
      above its rounding errors: its null directions get 0.
    - `svd`: by the singular value decomposition, in the dtype of `matrix`.
    - `rsvd`: by a randomised one of rank `rank` (Alg. 3), exact for `rank >= min(m, n)`.
    - `newton_schulz`: by matrix products alone, which suits accelerators. Singular values above 0.001 of the
      Frobenius norm become 1 to about 1e-4; smaller ones end between 0 and 1.
    - `colnorm`: not `U V^T`: every row, the weights of one output unit, is divided by its Euclidean norm.

    Args:
        matrix: `(..., m, n)`, floating point; leading axes are a batch. float16 and bfloat16 are computed in
            float32.
        method: one of the above.
        rank: the number of largest singular directions to keep, at least 1; `None` keeps all. For `eigh`,
            `svd` and `rsvd`.
        rcond: singular values of at most `rcond` times the largest count as zero, 0 <= rcond < 1; `None` is
            `max(m, n)` times the `eps` of the dtype that is computed in. For `eigh`, `svd` and `rsvd`.
        generator: draws the test matrix of `rsvd`; `None` is a new one with seed 0.

    Returns:
        The whitened matrix, `(..., m, n)`, in the dtype of `matrix`.

    Raises:
        ValueError: if an argument is outside its range or `matrix` is no floating-point matrix.
    """
    if not isinstance(matrix, Tensor) or matrix.ndim < 2 or not matrix.is_floating_point():
        found = (
            f"{tuple(matrix.shape)} {matrix.dtype}" if isinstance(matrix, Tensor) else type(matrix).__name__
        )
        raise ValueError(f"matrix must be a floating-point tensor of shape (..., m, n), got {found}")
    _check_whiten(method, rank, rcond)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator or None, got {generator!r}")
    return _whiten(matrix, method, rank, rcond, generator)[0].to(matrix.dtype)


def _whiten(
    matrix: Tensor, method: str, rank: int | None, rcond: float | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The whitened matrices, in the dtype that is computed in, and which of them `(...)` are whitened.

    Those that are zero or not finite are not.
    """
    if matrix.numel() == 0:
        return matrix.clone(), matrix.new_zeros(matrix.shape[:-2], dtype=torch.bool)
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    largest = matrix.abs().amax((-2, -1), keepdim=True).to(dtype)
    whitenable = largest.isfinite() & (largest > 0)
    regular = bool(whitenable.all())
    # Scaled by a power of two, which is exact, to entries of about 1: no square over- or underflows.
    limit = -math.frexp(torch.finfo(dtype).tiny)[1]
    exponent = torch.frexp(largest).exponent.clamp(-limit, limit)
    scaled = matrix.to(dtype) * torch.exp2(-exponent.to(dtype))
    if not regular:
        scaled = torch.where(whitenable, scaled, 0.0)
    if method == "eigh":
        result = _eigh(scaled, rank, rcond)
    elif method == "svd":
        result = _svd(scaled, rank, rcond)
    elif method == "rsvd":
        result = _rsvd(scaled, rank, rcond, generator)
    elif method == "newton_schulz":
        result = _newton_schulz(scaled)
    else:
        result = _colnorm(scaled)
    if not regular:
        result = torch.where(whitenable, result, matrix)
    return result, whitenable[..., 0, 0]


def _eigh(matrix: Tensor, rank: int | None, rcond: float | None) -> Tensor:
    m, n = matrix.shape[-2:]
    # G G^T = U S^2 U^T, in ascending order; for a tall matrix G^T G = V S^2 V^T
    squares, u = torch.linalg.eigh(_gram(matrix if m <= n else matrix.mT))
    s = squares.clamp_min(0).sqrt()
    largest = s[..., -1:]
    resolution = math.sqrt(max(m, n) * torch.finfo(s.dtype).eps)
    inverse = torch.where(s > max(rcond or 0.0, resolution) * largest, 1 / s, 0.0)
    if rank is not None:
        u, inverse = u[..., -rank:], inverse[..., -rank:]
    if not bool((inverse * largest <= _WELL_CONDITIONED).all()):
        matrix = matrix.double()
    u, inverse = u.to(matrix.dtype), inverse.to(matrix.dtype)
    # U S^(-1) U^T G, or G V S^(-1) V^T
    whitening: Tensor = (u * inverse[..., None, :]) @ u.mT
    return whitening @ matrix if m <= n else matrix @ whitening


def _gram(matrix: Tensor) -> Tensor:
    """`G G^T` in float64; on a CPU by blocks of columns, whose copies in float64 stay in the cache."""
    width = _BLOCK_COLUMNS if matrix.device.type == "cpu" else matrix.shape[-1]
    gram = matrix.new_zeros((*matrix.shape[:-1], matrix.shape[-2]), dtype=torch.float64)
    for block in torch.split(matrix, width, dim=-1):
        exact = block.double()
        gram += exact @ exact.mT
    return gram


def _svd(matrix: Tensor, rank: int | None, rcond: float | None) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > (_default_rcond(matrix) if rcond is None else rcond) * s[..., :1]
    # U V^T
    result: Tensor = (u * kept[..., None, :])[..., :rank] @ vh[..., :rank, :]
    return result


def _rsvd(matrix: Tensor, rank: int | None, rcond: float | None, generator: torch.Generator | None) -> Tensor:
    m, n = matrix.shape[-2:]
    size = min(m, n, rank or n)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    # Q ~ N(0, 1)^(n, r), drawn where the generator is, so that all devices see the same
    shape = (*matrix.shape[:-2], n, size)
    q = torch.randn(shape, dtype=matrix.dtype, generator=generator, device=generator.device)
    q = q.to(matrix.device)
    for _ in range(_POWER_ITERATIONS):
        # Q <- qr(G Q), then Q <- qr(G^T Q)
        q = torch.linalg.qr(matrix @ q).Q
        q = torch.linalg.qr(matrix.mT @ q).Q
    # B = G Q, its left singular vectors and singular values
    u, s, _ = torch.linalg.svd(matrix @ q, full_matrices=False)
    kept = s > (_default_rcond(matrix) if rcond is None else rcond) * s[..., :1]
    # U S^(-1) (U^T G)
    result: Tensor = (u * torch.where(kept, 1 / s, 0.0)[..., None, :]) @ (u.mT @ matrix)
    return result


def _newton_schulz(matrix: Tensor) -> Tensor:
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    norm = torch.linalg.matrix_norm(wide, keepdim=True)
    x = torch.where(norm > 0, wide / norm, 0.0)
    for a, b, c in _COEFFICIENTS:
        gram = x @ x.mT
        # X <- a X + (b X X^T + c (X X^T)^2) X
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide is matrix else x.mT


def _colnorm(matrix: Tensor) -> Tensor:
    tiny = torch.finfo(matrix.dtype).tiny
    rows = matrix / matrix.abs().amax(-1, keepdim=True).clamp_min(tiny)
    # G_i: <- G_i: / ||G_i:||, for rows of which each has been brought to entries of at most 1
    return torch.nn.functional.normalize(rows, dim=-1, eps=tiny)


def _default_rcond(matrix: Tensor) -> float:
    return max(matrix.shape[-2:]) * torch.finfo(matrix.dtype).eps


def _check_whiten(method: object, rank: object, rcond: object) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank must be an integer >= 1 or None, got {rank!r}")
    if rcond is not None:
        check_range("rcond", rcond, low=0.0, high=1.0)
    for name, value in (("rank", rank), ("rcond", rcond)):
        if value is not None and method in ("newton_schulz", "colnorm"):
            raise ValueError(f"{name} must be None for method {method!r}, which has none, got {value!r}")


class EGD(Wrapper):
    """Whitens the gradients of chosen matrices and hands them to another optimizer, the base.

    Parameters of more than two dimensions, such as convolution weights `(out, in, height, width)`, are
    treated as `(out, in * height * width)` matrices. The base's `weight_decay` is added to the gradient of a
    chosen matrix before it is whitened, and the base applies none to that matrix; everything else keeps the
    base's own weight decay, and so do the chosen matrices once EGD is switched off. Gradients are the
    caller's again after a step. They must be averaged over workers before it, as `DistributedDataParallel`
    does: whitening is not linear.

    To filter whitened gradients with Grokfast, as published, wrap in this order:
    `EGD(GrokfastEMA(SGD(...)))`.

    Args:
        base: a built optimizer, which takes the step. It may be a wrapper that needs no closure.
        method: see `whiten`.
        rank: see `whiten`.
        rcond: see `whiten`.
        select: which of the parameters of two or more dimensions are whitened; `None` is all. A string is a
            regular expression, searched in the parameter's name (the base must be built from named
            parameters); a function is called with the name, or without names the number of the parameter
            in all groups, and the parameter. It is asked once a parameter. The optimizer can be pickled if
            the function can.
        switch_threshold: accuracy above which `notify` switches off, 0 <= switch_threshold <= 1; 1 is never.
        fold_weight_decay: whether the base's weight decay is whitened with the gradient of a chosen matrix;
            if not, it stays the base's own for all.

    Attributes:
        enabled: whether gradients are whitened.
        skipped: how many gradients, of one matrix at one step, were passed on as they were because they were
            zero or not finite.
        whitened_steps: how many steps were taken while enabled; the seed of the next step's test matrices of
            `rsvd`.

    Raises:
        ValueError: if an argument is outside its range, or no parameter is selected.
    """

    memory: ClassVar[tuple[str, ...]] = ("enabled", "skipped", "whitened_steps")
    needs_closure: ClassVar[bool] = False
    matrices_only: ClassVar[bool] = False
    test_settings: ClassVar[dict[str, Any]] = {"base": {"name": "sgd", "lr": 0.03}}
    # Its updates keep their size near a minimum, so the battery lets lr decay to 0.
    test_schedule: ClassVar[str] = "linear"

    def __init__(
        self,
        base: Optimizer,
        method: str = "eigh",
        rank: int | None = None,
        rcond: float | None = None,
        select: Select | None = None,
        switch_threshold: float = 0.95,
        fold_weight_decay: bool = True,
    ) -> None:
        _check_whiten(method, rank, rcond)
        if isinstance(select, str):
            try:
                re.compile(select)
            except re.error as error:
                raise ValueError(f"select {select!r} is no regular expression: {error}") from error
        elif select is not None and not callable(select):
            raise ValueError(f"select must be a regular expression, a function or None, got {select!r}")
        _check_fraction("switch_threshold", switch_threshold)
        super().__init__(base)
        self.method = method
        self.rank = rank
        self.rcond = rcond
        self.select = select
        self.switch_threshold = switch_threshold
        self.fold_weight_decay = fold_weight_decay
        self.enabled = True
        self.skipped = 0
        self.whitened_steps = 0
        self._choices: list[list[bool]] = []
        if not any(any(chosen) for chosen in self._chosen()):
            what = "the base has none" if select is None else f"select = {select!r} matches none"
            raise ValueError(f"EGD needs a parameter of two or more dimensions to whiten, but {what}")

    def notify(self, accuracy: float) -> None:
        """Switch off for good if the accuracy exceeds `switch_threshold`.

        Args:
            accuracy: accuracy on validation data, 0 <= accuracy <= 1. Never pass that on test data: it would
                no longer be a test.

        Raises:
            ValueError: if `accuracy` is outside its range.
        """
        _check_fraction("accuracy", accuracy)
        if accuracy > self.switch_threshold:
            self.enabled = False

    def reenable(self) -> None:
        """Switch on again, for a stream whose distribution has changed."""
        self.enabled = True

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step.

        Args:
            closure: re-evaluates the model with gradients enabled and returns the loss.

        Returns:
            The closure's loss, or `None` without one.

        Raises:
            RuntimeError: if a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.enabled:
            self.base.step()
            return loss
        with torch.no_grad(), self._gradients_kept():
            self._whiten_gradients()
            with self._weight_decay_folded() if self.fold_weight_decay else nullcontext():
                self.base.step()
        self.whitened_steps += 1
        return loss

    def _whiten_gradients(self) -> None:
        generator = torch.Generator().manual_seed(self.whitened_steps)
        outcomes = []
        for group, chosen in zip(self.param_groups, self._chosen(), strict=True):
            sign = -1 if group.get("maximize") else 1
            decay = sign * group.get("weight_decay", 0.0) if self.fold_weight_decay else 0.0
            for parameter in compress(group["params"], chosen):
                if parameter.grad is None or parameter.numel() == 0:
                    continue
                # G <- G + weight_decay W
                gradient = torch.add(parameter.grad, parameter, alpha=decay) if decay else parameter.grad
                # G <- U V^T
                matrix = gradient.reshape(len(gradient), -1)
                result, whitened = _whiten(matrix, self.method, self.rank, self.rcond, generator)
                parameter.grad = torch.empty_like(gradient).copy_(result.view(gradient.shape))
                outcomes.append(whitened)
        self.skipped += sum(not whitened for whitened in outcomes)

    @contextmanager
    def _weight_decay_folded(self) -> Iterator[None]:
        """The base's groups, in which the chosen matrices have no weight decay: their gradients hold it.

        The others of a group are, for so long, in a group of their own behind the rest.
        """
        groups = self.param_groups
        count = len(groups)
        originals: list[tuple[dict[str, Any], dict[str, Any]]] = []
        try:
            for group, chosen in zip(list(groups), self._chosen(), strict=True):
                if not group.get("weight_decay") or not any(chosen):
                    continue
                members: dict[str, Any] = {
                    key: group[key] for key in ("params", "param_names") if key in group
                }
                originals.append((group, {**members, "weight_decay": group["weight_decay"]}))
                if not all(chosen):
                    others = [not choice for choice in chosen]
                    groups.append({**group, **{k: list(compress(v, others)) for k, v in members.items()}})
                    group.update({k: list(compress(v, chosen)) for k, v in members.items()})
                group["weight_decay"] = 0.0
            yield
        finally:
            del groups[count:]
            for group, original in originals:
                group.update(original)

    def _chosen(self) -> list[list[bool]]:
        """Which parameters of each group are whitened; groups that are new are asked about."""
        position = sum(map(len, self._choices))
        for group in self.param_groups[len(self._choices) :]:
            names = group.get("param_names", range(position, position + len(group["params"])))
            self._choices.append(
                [self._is_chosen(*pair) for pair in zip(names, group["params"], strict=True)]
            )
            position += len(group["params"])
        return self._choices

    def _is_chosen(self, name: str | int, parameter: Tensor) -> bool:
        if parameter.ndim < 2 or not parameter.is_floating_point():
            return False
        if self.select is None:
            return True
        if not isinstance(self.select, str):
            return bool(self.select(name, parameter))
        if not isinstance(name, str):
            raise ValueError(
                f"select = {self.select!r} is searched in names, but the base's parameters have none: "
                "build it from model.named_parameters()"
            )
        return re.search(self.select, name) is not None


def _check_fraction(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
