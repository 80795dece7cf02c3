"""What the sharpness-aware optimizers share: two passes, the ascent between them, the exact way back.

With `g` the gradient at the weights `w`, all tensors taken as one vector::

    e = rho g / (||g|| + 1e-12)                       the ascent
    e = rho w^2 g / (||w g|| + 1e-12)                 the adaptive ascent (ASAM), entry by entry
    g_s = gradient at w + e                           the second pass
    PSF = g_s - g  ~  rho H g / ||g||                 what the curvature H adds to the gradient

PSF, the projection of the second-order gradient onto the first-order one, is measured as this difference.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.optimizer import Optimizer

from piste_algorithms._checks import check_range
from piste_algorithms.optimizers._wrapping import Wrapper

EPS = 1e-12


def present_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of those parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def tensor_norms(tensors: Sequence[Tensor]) -> list[float]:
    """The Euclidean norm of each tensor, brought to the host at once; half precision is summed in float32."""
    if not tensors:
        return []
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)
    norms = torch._foreach_norm(list(tensors), 2, dtype)
    values: list[float] = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()
    return values


def ascend_(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], norm: float, rho: float, adaptive: bool
) -> None:
    """`w <- w + e`, in place.

    Args:
        parameters: the weights `w`.
        gradients: their gradients `g`, of the same shapes.
        norm: `||g||` over all of them.
        rho: the radius of the ascent, in units of the weights.
        adaptive: whether each entry is scaled by the square of its weight.
    """
    weights, directions = list(parameters), list(gradients)
    if adaptive:
        # e = rho w^2 g / (||w g|| + eps)
        directions = list(torch._foreach_mul(weights, directions))
        norm = math.hypot(*tensor_norms(directions))
        torch._foreach_mul_(directions, weights)
    # w <- w + rho g / (||g|| + eps)
    torch._foreach_add_(weights, directions, alpha=rho / (norm + EPS))


@contextmanager
def running_statistics_kept(model: nn.Module | None) -> Iterator[None]:
    """Running statistics of the model's normalisation layers are at the end what they were, bit for bit."""
    buffers = [
        (module, name, buffer.clone())
        for module in (() if model is None else model.modules())
        if isinstance(module, _NormBase)
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, kept in buffers:
            module.get_buffer(name).copy_(kept)


@dataclass(frozen=True)
class Sample:
    """What the two passes of a step found, for the parameters that had a gradient in both.

    Attributes:
        parameters: those parameters; their `grad` is `g_s`.
        gradients: `g` of each.
        gradient_norms: the norm of each `g`.
        psf: `g_s - g` of each.
        psf_norms: the norm of each.
        norm: `||g||` of the first pass.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    gradient_norms: list[float]
    psf: list[Tensor]
    psf_norms: list[float]
    norm: float


class SharpnessAware(Wrapper):
    """An optimizer that on some steps takes a second gradient, at the top of an ascent.

    A subclass chooses the steps, and what becomes of the other ones' gradients.

    Attributes:
        steps: steps taken.
        gradient_evaluations: calls of the closure that came back.
        sam_steps: steps with a second pass.
        psf_norm: `||PSF||` of the last second pass.
        psf_ratio: `||PSF|| / ||g||` of the last second pass.

    Args:
        base: a built optimizer, which takes the steps.
        rho: radius of the ascent, positive.
        adaptive: whether the ascent is ASAM's.
        model: the model whose normalisation layers keep the running statistics of the first pass.

    Raises:
        ValueError: if `base` is none that can be wrapped, or `rho` is outside its range.
    """

    needs_closure: ClassVar[bool] = True
    isolates_parameters: ClassVar[bool] = False  # one norm over all parameters scales the ascent
    memory: ClassVar[tuple[str, ...]] = (
        "steps",
        "gradient_evaluations",
        "sam_steps",
        "psf_norm",
        "psf_ratio",
    )

    def __init__(self, base: Optimizer, rho: float, adaptive: bool, model: nn.Module | None) -> None:
        check_range("rho", rho, low=0.0, low_open=True)
        super().__init__(base)
        self.rho = rho
        self.adaptive = adaptive
        self.model = model
        self.steps = 0
        self.gradient_evaluations = 0
        self.sam_steps = 0
        self.psf_norm = 0.0
        self.psf_ratio = 0.0

    @property
    def sam_fraction(self) -> float:
        """The fraction of the steps that had a second pass."""
        return self.sam_steps / max(1, self.steps)

    @abstractmethod
    def _chooses_second_pass(self, norm: float) -> bool:
        """Whether this step has a second pass; `norm` is `||g||`, NaN where there is no gradient at all."""

    def _keep(self, sample: Sample) -> None:
        """Keep of a second pass what later steps use."""

    def _reuse(self, parameters: list[Tensor], norm: float) -> None:
        """Change the gradients of a step without a second pass, in place."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step: the first pass, maybe a second one, the base's step.

        Args:
            closure: zeroes the gradients, computes the loss, calls `backward` and returns the loss. It is
                called once or twice.

        Returns:
            The loss of the first pass.

        Raises:
            RuntimeError: if there is no closure, or a gradient is sparse.
        """
        if closure is None:
            raise RuntimeError(
                f"{type(self).__name__}.step() needs a closure that zeroes the gradients, computes the loss, "
                "calls backward and returns the loss: it may be called twice in a step"
            )
        with torch.enable_grad():
            loss = closure()
        self.gradient_evaluations += 1
        with torch.no_grad():
            parameters = self._parameters()
            norms = tensor_norms(present_gradients(parameters))
            norm = math.hypot(*norms) if norms else math.nan
            chosen = self._chooses_second_pass(norm)
            if chosen and math.isfinite(norm):
                self._second_pass(closure, parameters, norms, norm)
            elif math.isfinite(norm):
                self._reuse(parameters, norm)
        self.base.step()
        self.steps += 1
        return loss

    def _second_pass(
        self, closure: Callable[[], Any], parameters: list[Tensor], norms: list[float], norm: float
    ) -> None:
        """Leave `g_s` in the gradients, or `g` where `g_s` is not finite; the weights are as before."""
        # Copies: the second pass may write into the same tensors.
        gradients = [gradient.clone() for gradient in present_gradients(parameters)]
        weights = [parameter.clone() for parameter in parameters]
        try:
            ascend_(parameters, gradients, norm, self.rho, self.adaptive)
            with running_statistics_kept(self.model), torch.enable_grad():
                closure()
        finally:
            torch._foreach_copy_(parameters, weights)
        self.gradient_evaluations += 1
        self.sam_steps += 1

        both = [index for index, parameter in enumerate(parameters) if parameter.grad is not None]
        found, first = [parameters[index] for index in both], [gradients[index] for index in both]
        # PSF = g_s - g
        psf = list(torch._foreach_sub(present_gradients(found), first)) if both else []
        psf_norms = tensor_norms(psf)
        psf_norm = math.hypot(*psf_norms) if both else math.nan
        if not math.isfinite(psf_norm):
            self.zero_grad()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            return
        self.psf_norm = psf_norm
        self.psf_ratio = psf_norm / norm if norm > 0 else 0.0
        self._keep(Sample(found, first, [norms[index] for index in both], psf, psf_norms, norm))
