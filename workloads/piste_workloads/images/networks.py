"""Networks for small images: an MLP, a convolutional one, residual ones and wide residual ones.

All take images `(batch, channels, height, width)`, normalised, and give logits `(batch, classes)`.

- `resnet18`: the ResNet-18 of He et al. (arXiv:1512.03385) in its form for 32 x 32 pixels: a stem of 3 x 3
  with stride 1, no pooling behind it, four stages of two blocks;
- `resnet`: the thin one of their section 4.2, depth 6 n + 2, three stages of n blocks, with projections
  (option B) where the shape changes;
- `wide_resnet`: Zagoruyko and Komodakis (arXiv:1605.07146), depth 6 n + 4, three stages of n pre-activated
  blocks, widened k times, without dropout.

First weights: convolutions N(0, 2 / fan_out) (He et al., arXiv:1502.01852, equation 14); linear layers
U(-1, 1) / sqrt(fan_in), as torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from piste_workloads.images.config import Model


def build_network(
    section: Model, channels: int, side: int, classes: int, generator: torch.Generator
) -> nn.Module:
    """The network of a recipe's `[model]`.

    Args:
        section: The recipe's section.
        channels: Of the images.
        side: Their height and width.
        classes: How many there are.
        generator: Draws the first weights.
    """
    network = _build(section, channels, side, classes)
    _initialise(network, generator)
    return network


def _build(section: Model, channels: int, side: int, classes: int) -> nn.Module:
    if section.name == "mlp":
        return mlp((channels * side**2, *section.hidden_widths, classes))
    if section.name == "conv":
        return conv(channels, section.first_width, classes)
    if section.name == "resnet18":
        return ResNet(channels, (64, 128, 256, 512), 2, classes)
    if section.name == "resnet":
        width = section.first_width
        return ResNet(channels, (width, 2 * width, 4 * width), (section.layers - 2) // 6, classes)
    return WideResNet(channels, section.first_width, (section.layers - 4) // 6, classes)


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """`widths[0] - ... - widths[-1]`, ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv(channels: int, width: int, classes: int) -> nn.Sequential:
    """Three convolutions of 3 x 3 with batch norm, ReLU and pooling, then the mean over places and a head."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((channels, width, 2 * width, 4 * width)):
        layers += [_conv3x3(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


class ResNet(nn.Module):
    """A residual network.

    Args:
        channels: Of the images.
        widths: Channels of each stage; every stage but the first halves the image.
        blocks: Of each stage.
        classes: How many there are.
    """

    def __init__(self, channels: int, widths: Sequence[int], blocks: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv3x3(channels, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.stages = nn.Sequential(*_stages(_Block, widths[0], widths, blocks))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """`(batch, channels, height, width) -> (batch, classes)`."""
        logits: Tensor = self.head(self.stages(self.stem(images)).mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """`relu(x' + BN(conv(relu(BN(conv(x))))))`, with `x' = x`, or `BN(conv1x1(x))` for another shape."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = relu(self.norm1(self.conv1(x)))
        output: Tensor = relu(self.shortcut(x) + self.norm2(self.conv2(hidden)))
        return output


class WideResNet(nn.Module):
    """A wide residual network.

    Args:
        channels: Of the images.
        factor: How many times it is wider than 16, 32 and 64 channels.
        blocks: Of each stage.
        classes: How many there are.
    """

    def __init__(self, channels: int, factor: int, blocks: int, classes: int) -> None:
        super().__init__()
        widths = (16 * factor, 32 * factor, 64 * factor)
        self.stem = _conv3x3(channels, 16)
        self.stages = nn.Sequential(*_stages(_WideBlock, 16, widths, blocks))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """`(batch, channels, height, width) -> (batch, classes)`."""
        features = relu(self.norm(self.stages(self.stem(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class _WideBlock(nn.Module):
    """`x' + conv(relu(BN(conv(o))))`, `o = relu(BN(x))`, with `x' = x`, or `conv1x1(o)` for another shape."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv3x3(inputs, outputs, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), _conv3x3(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.norm1(x))
        hidden = self.conv2(relu(self.norm2(self.conv1(active))))
        output: Tensor = hidden + (x if self.shortcut is None else self.shortcut(active))
        return output


def _stages(
    block: type[_Block] | type[_WideBlock], inputs: int, widths: Sequence[int], blocks: int
) -> list[nn.Module]:
    found: list[nn.Module] = []
    for stage, width in enumerate(widths):
        for number in range(blocks):
            stride = 2 if stage > 0 and number == 0 else 1
            found.append(block(inputs, width, stride))
            inputs = width
    return found


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


@torch.no_grad()
def _initialise(network: nn.Module, generator: torch.Generator) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            module.weight.normal_(0.0, math.sqrt(2.0 / fan_out), generator=generator)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            module.weight.uniform_(-bound, bound, generator=generator)
            module.bias.uniform_(-bound, bound, generator=generator)
