"""The network: an encoder that halves a picture, a decoder that doubles it again, a heat map a keypoint.

The encoder's level `l` has `width 2^l` channels at `2^-(l+2)` of the input's size; the decoder takes the maps
of each level along on its way back, to a quarter of the input's size (Ronneberger, Fischer and Brox, "U-Net",
arXiv:1505.04597, with batch norms and one convolution a level on the way back). First weights are
N(0, 2 / fan_out) (He et al., arXiv:1502.01852, equation 14), those of the head N(0, 0.001^2): the first maps
are nearly zero, as most of what is taught is.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from piste_workloads.pose.config import Model

STRIDE = 4  # pixels of the input to a pixel of a heat map


class HeatMaps(nn.Module):
    """Predicts heat maps.

    Args:
        config: The recipe's `[model]`.
        keypoints: How many maps.
        generator: Draws the first weights.
    """

    def __init__(self, config: Model, keypoints: int, generator: torch.Generator) -> None:
        super().__init__()
        widths = [config.width * 2**level for level in range(config.levels + 1)]
        self.stem = nn.Sequential(
            _convolution(3, widths[0], stride=2), _convolution(widths[0], widths[0], stride=2)
        )
        self.encoder = nn.ModuleList(
            nn.Sequential(_convolution(before, width, stride=2), _convolution(width, width))
            for before, width in pairwise(widths)
        )
        self.decoder = nn.ModuleList(
            _convolution(below + width, width) for width, below in reversed(list(pairwise(widths)))
        )
        self.head = nn.Conv2d(widths[0], keypoints, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size)
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out), generator=generator)
        nn.init.normal_(self.head.weight, std=1e-3, generator=generator)
        nn.init.constant_(self.head.bias, 0.0)  # type: ignore[arg-type]

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures of values from 0 to 255 to maps of a quarter of their size.

        Args:
            pictures: `(batch, 3, height, width)`.

        Returns:
            `(batch, keypoints, ceil(height / 4), ceil(width / 4))`.
        """
        x = self.stem((pictures - 127.5) / 64.0)
        levels: list[Tensor] = []
        for down in self.encoder:
            levels.append(x)
            x = down(x)
        for up in self.decoder:
            beside = levels.pop()
            x = up(torch.cat((interpolate(x, size=beside.shape[2:], mode="nearest"), beside), dim=1))
        maps: Tensor = self.head(x)
        return maps


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A convolution of 3 x 3, a batch norm and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
