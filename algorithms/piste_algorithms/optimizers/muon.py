"""Muon for matrices and AdamW for the rest, in one optimizer.

For a matrix `W` of shape `(m, n)` with gradient `G`::

    M <- mu M + (1 - mu) G
    U <- (1 - mu) G + mu M                    (Nesterov; otherwise U <- M)
    O <- Newton-Schulz(U)                     (about the orthogonal factor of U)
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(m, n)) O

Both rules are torch's own functions: `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` and
`torch.optim.AdamW`. torch's Muon takes two-dimensional parameters only; convolution weights go to AdamW here.

Sources: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale
`0.2 sqrt(max(m, n))`: Liu et al., "Muon is scalable for LLM training" (arXiv:2502.16982).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, muon
from torch.optim.optimizer import ParamsT

from piste_algorithms.optimizers._adamw import WithAdamW
from piste_algorithms.optimizers._groups import matrix_param_groups


class Muon(WithAdamW):
    """Muon in groups with `use_muon=True` (the default), AdamW in groups with `use_muon=False`.

    `Muon.default_param_groups(model)` makes both kinds of groups. Each kind equals torch's optimizer of that
    name bit for bit, and `lr` and `weight_decay` of a group may be changed between steps.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer.
        lr: learning rate, at least 0.
        momentum: coefficient mu of the moving average, 0 <= momentum < 1.
        nesterov: look ahead by one average.
        weight_decay: decoupled weight decay, at least 0.
        ns_steps: Newton-Schulz iterations, from 1 to 99.
        adamw_betas: AdamW's betas, each in [0, 1).
        adamw_eps: AdamW's eps, at least 0.

    Raises:
        ValueError: if an argument or a group's option is outside its range, or a group with `use_muon=True`
            holds a parameter that is not two-dimensional.
    """

    flag: ClassVar[str] = "use_muon"
    adamw_eps: ClassVar[str] = "adamw_eps"
    takes: ClassVar[str] = "real two-dimensional parameters"
    needs_closure: ClassVar[bool] = False
    matrices_only: ClassVar[bool] = False
    test_settings: ClassVar[dict[str, Any]] = {"lr": 0.2, "weight_decay": 0.0}
    test_schedule: ClassVar[str] = "linear"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        ns_steps: int = 5,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "ns_steps": ns_steps,
                "adamw_betas": adamw_betas,
                "adamw_eps": adamw_eps,
                "use_muon": True,
            },
        )

    @staticmethod
    def default_param_groups(model: nn.Module) -> list[dict[str, Any]]:
        """The groups a platform builds for a model by default; convolution weights go to AdamW."""
        return matrix_param_groups(model, flag="use_muon", convolutions=False)

    def _is_matrix(self, parameter: Tensor) -> bool:
        return parameter.ndim == 2

    def _check_rule(self, group: Mapping[str, Any]) -> None:
        ns_steps = group["ns_steps"]
        if not isinstance(ns_steps, int) or isinstance(ns_steps, bool) or not 1 <= ns_steps <= 99:
            raise ValueError(f"ns_steps must be an integer from 1 to 99, got {ns_steps!r}")

    def _update_matrices(
        self,
        group: Mapping[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        buffers: list[Tensor],
    ) -> None:
        muon(
            parameters,
            gradients,
            buffers,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
            ns_steps=group["ns_steps"],
            eps=EPS,
            adjust_lr_fn="match_rms_adamw",
            has_complex=False,
        )
