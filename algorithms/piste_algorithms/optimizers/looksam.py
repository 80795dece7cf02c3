"""LookSAM: SAM's second gradient every k steps; between them, the part of it that changes slowly.

With `g` the gradient and `g_s` SAM's gradient, all tensors taken as one vector::

    every k-th step, the first among them:
        g_v = g_s - <g, g_s> / ||g||^2 g              the part of g_s orthogonal to g
        the base optimizer steps with g_s
    on the others:
        the base optimizer steps with g + alpha ||g|| / ||g_v|| g_v

The decomposition is *global*, as the paper writes it and the public re-implementation does: one inner product
and one norm over all weights. `pytorch_optimizer.LookSAM` decomposes each tensor by itself, which is another
method: a bias or gain, whose `g_s` is nearly parallel to `g`, then gets a step of its own of size
`alpha ||g||` along what is left of it, be it noise.

`1 + 1 / k` gradient evaluations a step. `sam.py` says what the closure does.

Source: Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware Minimization" (2022,
arXiv:2203.02714), algorithm 1.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from piste_algorithms._checks import check_integer, check_range
from piste_algorithms.optimizers._ascent import Sample, SharpnessAware, present_gradients, tensor_norms


def orthogonal_part(psf: Sequence[Tensor], gradients: Sequence[Tensor], norm: float) -> list[Tensor]:
    """What of `g_s` is orthogonal to `g`, all tensors taken as one vector.

    Args:
        psf: `g_s - g`, whose orthogonal part is that of `g_s`, with less rounding.
        gradients: `g`, of the same shapes.
        norm: `||g||` over all of them.

    Returns:
        `g_v`, new tensors.
    """
    products = [
        (left * right).sum(dtype=torch.promote_types(left.dtype, torch.float32))
        for left, right in zip(psf, gradients, strict=True)
    ]
    along = math.fsum(torch.stack([product.to(products[0].device) for product in products]).tolist())
    # g_v = g_s - <g, g_s> / ||g||^2 g = PSF - <g, PSF> / ||g||^2 g
    return list(torch._foreach_add(list(psf), list(gradients), alpha=-along / norm / norm))


class LookSAM(SharpnessAware):
    """LookSAM around any optimizer, with the global decomposition.

    Where `g_v` is nothing but the rounding of `g_s` (a single weight, say, whose gradients are all parallel)
    there is nothing to reuse, and the steps between are the base's. After a second pass that was not finite
    the older part is reused; where there is none, the next step has a second pass. Otherwise as `SAM`.

    Args:
        base: a built optimizer, which takes the steps; its groups are this one's.
        rho: radius of the ascent, positive.
        k: steps from one second pass to the next, at least 1; 1 is SAM.
        alpha: size of the reused part in units of the gradient, at least 0.
        adaptive: whether each entry of the ascent is scaled by the square of its weight.
        model: the model; its normalisation layers keep the running statistics of the first pass alone.

    Raises:
        ValueError: if an argument is outside its range.
    """

    test_settings: ClassVar[dict[str, Any]] = {
        "base": {"name": "adamw", "lr": 0.2, "weight_decay": 0.0},
        "rho": 0.01,
    }
    test_schedule: ClassVar[str] = "linear"
    # In a curved valley the reused part points across it a few steps later, and it is as long as alpha times
    # the gradient however small PSF was.
    test_exclusions: ClassVar[tuple[str, ...]] = ("Rosenbrock",)
    memory: ClassVar[tuple[str, ...]] = (*SharpnessAware.memory, "orthogonal_norm")

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.1,
        k: int = 5,
        alpha: float = 0.7,
        adaptive: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        check_integer("k", k, low=1)
        check_range("alpha", alpha, low=0.0)
        super().__init__(base, rho, adaptive, model)
        self.k = k
        self.alpha = alpha
        # ||g_v||; 0 where nothing is to be reused, None where there is none yet
        self.orthogonal_norm: float | None = None

    def _chooses_second_pass(self, norm: float) -> bool:
        return self.steps % self.k == 0 or self.orthogonal_norm is None

    def _keep(self, sample: Sample) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].pop("orthogonal", None)
        parts = orthogonal_part(sample.psf, sample.gradients, sample.norm) if sample.norm > 0 else sample.psf
        norm = math.hypot(*tensor_norms(parts))
        # What the subtraction in PSF leaves of two parallel gradients is about this long.
        rounding = max(torch.finfo(part.dtype).eps for part in parts) * (sample.norm + self.psf_norm)
        self.orthogonal_norm = norm if norm > 4 * rounding else 0.0
        for parameter, part in zip(sample.parameters, parts, strict=True):
            self.state[parameter]["orthogonal"] = part

    def _reuse(self, parameters: list[Tensor], norm: float) -> None:
        if not self.orthogonal_norm:
            return
        found = [parameter for parameter in parameters if "orthogonal" in self.state[parameter]]
        if found:
            # g <- g + alpha ||g|| / ||g_v|| g_v
            torch._foreach_add_(
                present_gradients(found),
                [self.state[parameter]["orthogonal"] for parameter in found],
                alpha=self.alpha * norm / self.orthogonal_norm,
            )
