"""What a prompt may be: three ways to make `model(x, prompt) -> logits` of a torch classifier.

Each holds a frozen copy of the classifier in evaluation mode, so nothing but the prompt can change a
prediction. `RewrittenPrompt` writes any of them in other coordinates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from piste_algorithms._checks import check_integer, check_range
from piste_algorithms.adaptation.adapter import PromptedModel

NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # _NormBase: batch and instance

Part = TypeVar("Part", bound=Callable[..., Tensor])


class AdditivePrompt(nn.Module):
    """Adds the prompt to every input: `classifier(x + prompt)`.

    Args:
        classifier: `classifier(x) -> (batch, classes)` logits.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = _frozen(classifier)

    def initial(self, x: Tensor) -> Tensor:
        """Zeros of the shape of one of the inputs `x`, `(batch, ...)`: the classifier as it is."""
        return torch.zeros_like(x[0])

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """Logits `(batch, classes)`."""
        logits: Tensor = self.classifier(x + prompt)
        return logits


class TokenPrompt(nn.Module):
    """Puts the prompt's tokens before those of every input: `classify([prompt, embed(x)])`.

    Args:
        embed: inputs to tokens `(batch, time, width)`.
        classify: tokens of any number to logits `(batch, classes)`.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor], classify: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = _frozen(embed)
        self.classify = _frozen(classify)

    @staticmethod
    def initial(
        tokens: int, width: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Normal tokens `(tokens, width)` with a standard deviation of 0.02, on the generator's device.

        Raises:
            ValueError: if `tokens` or `width` is below 1.
        """
        check_integer("tokens", tokens, low=1)
        check_integer("width", width, low=1)
        drawn = torch.randn(tokens, width, generator=generator, device=generator.device, dtype=dtype)
        return 0.02 * drawn

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """Logits `(batch, classes)`."""
        tokens = self.embed(x)
        return self.classify(torch.cat([prompt.expand(len(tokens), *prompt.shape), tokens], dim=1))


class NormalizationPrompt(nn.Module):
    """The prompt is the gains and shifts of the classifier's normalisation layers, in one vector.

    Args:
        classifier: `classifier(x) -> (batch, classes)` logits, with normalisation layers that have gains.
        batch_statistics: whether batch normalisation uses each batch's own statistics, as TENT does;
            predictions then depend on the other inputs of their batch, so that `FisherPrompt` cannot use it.

    Raises:
        ValueError: if the classifier has no such layer.
    """

    def __init__(self, classifier: nn.Module, batch_statistics: bool = False) -> None:
        super().__init__()
        self.classifier = _frozen(classifier)
        self.names: list[str] = []
        for name, module in self.classifier.named_modules():
            if isinstance(module, NORMALIZATIONS):
                own = [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
                self.names.extend(own)
            if batch_statistics and isinstance(module, _BatchNorm):
                module.train()
                module.track_running_stats = False
                module.running_mean = module.running_var = None
        if not self.names:
            raise ValueError("classifier must have normalisation layers with gains, and it has none")

    def initial(self) -> Tensor:
        """The classifier's own gains and shifts, one vector."""
        return torch.cat([self.classifier.get_parameter(name).detach().flatten() for name in self.names])

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """Logits `(batch, classes)`."""
        shapes = [self.classifier.get_parameter(name).shape for name in self.names]
        pieces = torch.split(prompt, [shape.numel() for shape in shapes])
        views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        named = dict(zip(self.names, views, strict=True))
        logits: Tensor = functional_call(self.classifier, named, (x,))
        return logits


class RewrittenPrompt(nn.Module):
    """A prompt in other linear coordinates: `model(x, start + matrix coordinates)`.

    The matrix is a random one whose singular values are evenly spaced in their logarithm, around 1.

    Args:
        model: `model(x, prompt) -> (batch, classes)` logits.
        start: the prompt at which all coordinates are 0.
        condition: the largest singular value over the smallest, at least 1.
        generator: draws the matrix, on the device of `start`.

    Raises:
        ValueError: if `condition` is outside its range.
    """

    def __init__(
        self, model: PromptedModel, start: Tensor, condition: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        check_range("condition", condition, low=1.0)
        self.model = model
        self.start = start.detach().clone()
        size, dtype, device = start.numel(), start.dtype, start.device
        left, right = (
            torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=dtype, device=device))[0]
            for _ in range(2)
        )
        half = math.log10(condition) / 2
        values = torch.logspace(-half, half, size, dtype=dtype, device=device)
        self.matrix = left @ torch.diag(values) @ right

    def initial(self) -> Tensor:
        """Zeros of the number of the prompt's entries: the prompt `start`."""
        return torch.zeros_like(self.start).flatten()

    def prompt(self, coordinates: Tensor) -> Tensor:
        """The prompt that coordinates `(d,)` stand for."""
        # start + A phi
        moved: Tensor = self.start + (self.matrix @ coordinates).view_as(self.start)
        return moved

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """Logits `(batch, classes)`."""
        return self.model(x, self.prompt(coordinates))


def _frozen(part: Part) -> Part:
    kept = copy.deepcopy(part)
    if isinstance(kept, nn.Module):
        kept.eval().requires_grad_(False)
    return kept
