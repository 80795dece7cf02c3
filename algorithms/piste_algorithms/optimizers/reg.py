"""REG: momentum whose matrices are balanced by row and column scaling (RACS) instead of orthogonalised.

For a matrix `W` of shape `(m, n)` with gradient `G`::

    M <- mu M + (1 - mu) G
    U <- (1 - mu) G + mu M                    (Nesterov; otherwise U <- M)
    n_sweeps times:  U_ij <- U_ij / ||U_i:||_p,  then  U_ij <- U_ij / ||U_:j||_p          (RACS)
    U <- U rms sqrt(m n) / ||U||_F            (the root mean square entry of U is `rms`)
    W <- (1 - lr weight_decay) W - lr U

The state is one momentum buffer a parameter, half of AdamW's. With `rms=0.2` an update is as large as a
typical AdamW update, so AdamW's learning rate and weight decay carry over.

Sources: REG is Muon with the matrix sign replaced by the row-and-column-scaling operator; the published
abstract does not fix the order of the two scalings, the number of sweeps, `p` or the momentum, so those are
arguments here and their defaults are this project's choice. `rms = 0.2` is the `match_rms_adamw` rule of Muon
(Liu et al., "Muon is scalable for LLM training", arXiv:2502.16982). Scaling all rows to equal norm is within
sqrt(m) of the best row scaling for the condition number (van der Sluis, 1969). This is *not* the optimizer
called RACS of Gong et al. (arXiv:2502.07752), which scales the raw gradient by running averages and keeps no
momentum.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from piste_algorithms._checks import check_range
from piste_algorithms.optimizers._adamw import WithAdamW
from piste_algorithms.optimizers._groups import matrix_param_groups

ORDERS = ("row_col", "col_row")

# Matrices of equal shape are computed together, up to this many entries at a time: on a CPU about what stays
# in cache (1 MiB of float32), elsewhere enough to fill the device (two buffers of 256 MiB).
_BATCH_ENTRIES_CPU = 2**18
_BATCH_ENTRIES = 2**26


def racs(
    matrix: Tensor,
    n_sweeps: int = 1,
    order: str = "row_col",
    p: float = 2,
    rms: float | None = 0.2,
    eps: float = 1e-8,
) -> Tensor:
    """Row-and-column scaling of a matrix: rows to equal p-norm, then columns, then a fixed root mean square.

    With one sweep in the order `row_col` the non-zero columns of the result have exactly equal norms and the
    rows nearly; more sweeps balance both (Sinkhorn-Knopp on `|U|^p`). Rows and columns of zeros stay zero,
    and so does the zero matrix. The result does not depend on the scale of `matrix`, nor (in this order) on
    any positive scaling of its rows within the reach of `eps`. A non-finite entry makes its whole matrix
    non-finite.

    Args:
        matrix: `(..., m, n)`, floating point; leading axes are a batch. float16 and bfloat16 are computed in
            float32.
        n_sweeps: number of sweeps, at least 1.
        order: `"row_col"` or `"col_row"`, which side is scaled first in a sweep.
        p: the p-norm that is made equal, 1 <= p < inf.
        rms: root mean square entry of the result, positive; `None` leaves the scaled matrix as it is.
        eps: a row or column whose norm is below `eps` times the largest is divided by that bound instead, so
            that rounding noise is not blown up; 0 <= eps < 1.

    Returns:
        The scaled matrix, `(..., m, n)`, in the dtype of `matrix`.

    Raises:
        ValueError: if an argument is outside its range or `matrix` is no floating-point matrix.
    """
    if not isinstance(matrix, Tensor) or matrix.ndim < 2 or not matrix.is_floating_point():
        found = (
            f"{tuple(matrix.shape)} {matrix.dtype}" if isinstance(matrix, Tensor) else type(matrix).__name__
        )
        raise ValueError(f"matrix must be a floating-point tensor of shape (..., m, n), got {found}")
    _check_racs(n_sweeps, order, p, rms, eps)
    if matrix.numel() == 0:
        return matrix.clone()
    balanced = matrix.to(_compute_dtype(matrix.dtype), copy=True, memory_format=torch.contiguous_format)
    batch = balanced.view(-1, *matrix.shape[-2:])
    _racs_(batch, torch.empty_like(batch), n_sweeps, order, p, rms, eps)
    return balanced.to(matrix.dtype)


def _racs_(
    matrices: Tensor,
    powers: Tensor,
    n_sweeps: int,
    order: str,
    p: float,
    rms: float | Tensor | None,
    eps: float | Tensor,
    factor: float | Tensor = 1.0,
) -> None:
    """`factor` times RACS, in place on a contiguous batch `(k, m, n)`; `powers` is work space of that shape.

    The scalings of all sweeps are found from `|U|^p` alone (two reductions a sweep) and applied once.
    """
    m, n = matrices.shape[-2:]
    row_sums = _power_sums(matrices, powers, p)
    if matrices.device.type != "cpu" or not _squares_are_safe(row_sums):
        # A power of two near 1 / max |U|: exact, and only over- or underflow of the powers can tell.
        largest = torch.maximum(matrices.amax((1, 2)), -matrices.amin((1, 2)))
        limit = -math.frexp(torch.finfo(matrices.dtype).tiny)[1]
        exponent = torch.frexp(largest)[1].clamp(-limit, limit)
        matrices.mul_(torch.exp2(-exponent.to(matrices.dtype)).view(-1, 1, 1))
        row_sums = _power_sums(matrices, powers, p)

    inverse_rows = torch.ones_like(row_sums)  # prod over sweeps of 1 / ||U_i:||_p^p, (k, m)
    inverse_columns = matrices.new_ones(matrices.shape[0], n)  # prod over sweeps of 1 / ||U_:j||_p^p, (k, n)
    relative = divisor = row_sums
    for sweep in range(n_sweeps):
        for side in order.split("_"):
            if side == "row":
                # ||U_i:||_p^p = R_i sum_j |U_ij|^p C_j
                first = sweep == 0 and order == "row_col"
                sums = row_sums if first else torch.bmm(powers, inverse_columns[:, :, None])[:, :, 0]
                relative = sums * inverse_rows
                divisor = _divisor(relative, eps**p)
                inverse_rows = inverse_rows / divisor
            else:
                # ||U_:j||_p^p = C_j sum_i |U_ij|^p R_i
                sums = torch.bmm(inverse_rows[:, None, :], powers)[:, 0, :]
                relative = sums * inverse_columns
                divisor = _divisor(relative, eps**p)
                inverse_columns = inverse_columns / divisor

    row_scale, column_scale = inverse_rows, inverse_columns
    if p == 2:
        row_scale, column_scale = inverse_rows.sqrt(), inverse_columns.sqrt()
        # After the last division ||U||_F^2 is the sum of its squared norms: no third pass over the matrix.
        squared_frobenius = (relative / divisor).sum(-1)
    else:
        row_scale, column_scale = inverse_rows ** (1 / p), inverse_columns ** (1 / p)
        torch.mul(matrices, row_scale[:, :, None], out=powers)
        squared_frobenius = powers.mul_(column_scale[:, None, :]).square_().sum((1, 2))
    if rms is not None:
        # U <- U rms sqrt(m n) / ||U||_F
        frobenius = squared_frobenius.sqrt()
        column_scale = column_scale * (rms * (m * n) ** 0.5 / _nonzero(frobenius))[:, None]
    matrices.mul_(row_scale[:, :, None]).mul_((factor * column_scale)[:, None, :])


def _power_sums(matrices: Tensor, powers: Tensor, p: float) -> Tensor:
    """Write `|U|^p` into `powers` and return its row sums `(k, m)`."""
    if p == 2:
        torch.mul(matrices, matrices, out=powers)
    else:
        torch.abs(matrices, out=powers).pow_(p)
    return powers.sum(-1)


def _squares_are_safe(row_sums: Tensor) -> bool:
    """Whether no power of any matrix of the batch has over- or underflowed to a degree that matters."""
    totals = row_sums.sum(-1)
    limits = torch.finfo(row_sums.dtype)
    smallest, largest = float(totals.amin()), float(totals.amax())
    return bool(limits.tiny**0.25 <= smallest and largest <= limits.max**0.5)


def _divisor(relative: Tensor, floor: float | Tensor) -> Tensor:
    """What to divide by: the (powers of) norms, at least `floor` times the largest of them; 1 where zero."""
    bound = floor * relative.amax(-1, keepdim=True)
    bounded = torch.maximum(relative, bound).clamp_min(torch.finfo(relative.dtype).tiny)
    return torch.where(relative == 0, torch.ones_like(relative), bounded)


def _nonzero(values: Tensor) -> Tensor:
    return torch.where(values == 0, torch.ones_like(values), values)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_racs(n_sweeps: object, order: object, p: object, rms: object, eps: object) -> None:
    if not isinstance(n_sweeps, int) or isinstance(n_sweeps, bool) or n_sweeps < 1:
        raise ValueError(f"n_sweeps must be an integer >= 1, got {n_sweeps!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(map(repr, ORDERS))}, got {order!r}")
    check_range("p", p, low=1.0)
    if rms is not None:
        check_range("rms", rms, low=0.0, low_open=True)
    check_range("eps", eps, low=0.0, high=1.0)


def reg_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    n_sweeps: int,
    order: str,
    p: float,
    rms: float | None,
    eps: float,
) -> None:
    """One REG update, in place, of parameters of two or more dimensions and their momentum buffers.

    Args:
        parameters: tensors `(m, ...)`; each is treated as an `(m, n)` matrix, its trailing axes flattened.
        gradients: their gradients, of the same shapes.
        momentum_buffers: their momenta, of the same shapes.
        lr: learning rate.
        momentum: mu, the coefficient of the moving average.
        nesterov: whether to look ahead.
        weight_decay: decoupled weight decay.
        n_sweeps: see `racs`, as are `order`, `p`, `rms` and `eps`.
        order: see `racs`.
        p: see `racs`.
        rms: see `racs`.
        eps: see `racs`.
    """
    buckets: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for index, parameter in enumerate(parameters):
        if parameter.numel() > 0:
            buckets.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(index)

    for (shape, dtype, device), members in buckets.items():
        limit = _BATCH_ENTRIES_CPU if device.type == "cpu" else _BATCH_ENTRIES
        size = min(len(members), max(1, limit // shape.numel()))
        work = torch.empty((2, size, shape[0], shape[1:].numel()), dtype=_compute_dtype(dtype), device=device)
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            weights = [parameters[index] for index in batch]
            grads = [gradients[index] for index in batch]
            averages = [momentum_buffers[index] for index in batch]
            update, powers = work[:, : len(batch)]
            views = list(update.view(-1, *shape).unbind(0))

            # M <- mu M + (1 - mu) G
            torch._foreach_lerp_(averages, grads, 1 - momentum)
            # U <- (1 - mu) G + mu M, or U <- M
            for view, grad, average in zip(views, grads, averages, strict=True):
                if nesterov:
                    torch.lerp(grad.to(view.dtype), average.to(view.dtype), momentum, out=view)
                else:
                    view.copy_(average)
            # U <- -lr RACS(U)
            _racs_(update, powers, n_sweeps, order, p, rms, eps, factor=-lr)
            # W <- (1 - lr weight_decay) W + U; half precision is rounded once
            for view, weight in zip(views, weights, strict=True):
                torch.add(view, weight, alpha=1 - lr * weight_decay, out=weight)


class REG(WithAdamW):
    """REG for matrices (groups with `use_reg=True`, the default) and AdamW for the rest (`use_reg=False`).

    `REG.default_param_groups(model)` makes both kinds of groups. Parameters of more than two dimensions, such
    as convolution weights `(out, in, height, width)`, are treated as `(out, in * height * width)` matrices. A
    group with `use_reg=False` is `torch.optim.AdamW` bit for bit, with the betas `adamw_betas` and that
    group's `eps`.

    A matrix whose gradient holds a non-finite entry becomes non-finite, as under torch's own optimizers; no
    other parameter is touched by it. A zero momentum gives no update beyond weight decay. State and momentum
    have the parameter's dtype; for float16 and bfloat16 the arithmetic is float32.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer.
        lr: learning rate, at least 0.
        momentum: coefficient mu of the moving average, 0 <= momentum < 1.
        nesterov: look ahead by one average.
        weight_decay: decoupled weight decay, at least 0.
        n_sweeps: see `racs`.
        order: see `racs`.
        p: see `racs`.
        rms: see `racs`.
        eps: see `racs`; in groups with `use_reg=False`, AdamW's `eps`.
        adamw_betas: AdamW's betas, each in [0, 1).

    Raises:
        ValueError: if an argument or a group's option is outside its range, or a group with `use_reg=True`
            holds a parameter of fewer than two dimensions.
    """

    flag: ClassVar[str] = "use_reg"
    adamw_eps: ClassVar[str] = "eps"
    takes: ClassVar[str] = "real parameters of two or more dimensions"
    needs_closure: ClassVar[bool] = False
    matrices_only: ClassVar[bool] = False
    # Its updates keep their size near a minimum, as those of sign descent do, so the battery lets lr decay to
    # 0.
    test_settings: ClassVar[dict[str, Any]] = {"lr": 0.2, "weight_decay": 0.0}
    test_schedule: ClassVar[str] = "linear"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        n_sweeps: int = 1,
        order: str = "row_col",
        p: float = 2,
        rms: float | None = 0.2,
        eps: float = 1e-8,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "n_sweeps": n_sweeps,
                "order": order,
                "p": p,
                "rms": rms,
                "eps": eps,
                "adamw_betas": adamw_betas,
                "use_reg": True,
            },
        )

    @staticmethod
    def default_param_groups(model: nn.Module) -> list[dict[str, Any]]:
        """The groups a platform builds for a model by default: `matrix_param_groups(model)`."""
        return matrix_param_groups(model, flag="use_reg")

    def _is_matrix(self, parameter: Tensor) -> bool:
        return parameter.ndim >= 2

    def _check_rule(self, group: Mapping[str, Any]) -> None:
        _check_racs(group["n_sweeps"], group["order"], group["p"], group["rms"], group["eps"])

    def _update_matrices(
        self,
        group: Mapping[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        buffers: list[Tensor],
    ) -> None:
        reg_step(
            parameters,
            gradients,
            buffers,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            n_sweeps=group["n_sweeps"],
            order=group["order"],
            p=group["p"],
            rms=group["rms"],
            eps=group["eps"],
        )
