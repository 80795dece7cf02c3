"""SAM: the gradient is taken at the worst point nearby, so that training ends where the loss is flat.

For weights `w` with gradient `g`, all tensors taken as one vector::

    e = rho g / (||g|| + 1e-12)                       (adaptive=True: e = rho w^2 g / (||w g|| + 1e-12))
    g_s = gradient at w + e
    w <- the base optimizer's step from w with g_s

Two gradient evaluations a step, so `step` takes a closure and calls it twice::

    def closure():
        optimizer.zero_grad()
        loss = loss_function(model(inputs), targets)
        loss.backward()
        return loss

    loss = optimizer.step(closure)

- Gradient accumulation: the closure zeroes once and calls `backward` for each micro-batch.
- Data-parallel training: the closure leaves averaged gradients, as the backward pass of
  `DistributedDataParallel` does. All ranks then climb and step alike.
- Mixed precision in bfloat16: `torch.autocast` around the forward pass, nothing else.
- Mixed precision in float16: the closure unscales its own gradients, and drops them after an overflow.
  Dropped in the first pass, they leave the step out; in the second, the step is the base's with `g`::

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = loss_function(model(inputs), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() < scale:  # an overflow
            optimizer.zero_grad()
        return loss

    loss = optimizer.step(closure)  # not scaler.step, which takes no closure

Sources: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
Generalization" (2021, arXiv:2010.01412), algorithm 1; Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware
Minimization for Scale-Invariant Learning of Deep Neural Networks" (2021, arXiv:2102.11600).
"""

from typing import Any, ClassVar

from torch import nn
from torch.optim.optimizer import Optimizer

from piste_algorithms.optimizers._ascent import SharpnessAware


class SAM(SharpnessAware):
    """SAM around any optimizer; `adaptive=True` is ASAM.

    Where `g` or `g_s` is not finite, the base steps with `g`. A parameter without a gradient in the first
    pass is not moved by the ascent. If the closure raises in the second pass, the weights are those before
    the step.

    `steps`, `gradient_evaluations`, `sam_steps`, `sam_fraction`, `psf_norm` and `psf_ratio` tell what was
    done; the last two are of `g_s - g`.

    Args:
        base: a built optimizer, which takes the steps; its groups are this one's.
        rho: radius of the ascent, positive.
        adaptive: whether each entry of the ascent is scaled by the square of its weight.
        model: the model; its normalisation layers keep the running statistics of the first pass alone.

    Raises:
        ValueError: if `base` is no optimizer or needs a closure itself, or `rho` is outside its range.
    """

    test_settings: ClassVar[dict[str, Any]] = {
        "base": {"name": "adamw", "lr": 0.2, "weight_decay": 0.0},
        "rho": 0.01,
    }
    test_schedule: ClassVar[str] = "linear"

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(base, rho, adaptive, model)

    def _chooses_second_pass(self, norm: float) -> bool:
        return True
