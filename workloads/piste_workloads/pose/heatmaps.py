"""Heat maps: a keypoint as a bump of a picture, and back, to a fraction of a pixel.

A network that predicts keypoints gives one map each, whose values are how much the keypoint is there. It is
taught Gaussian bumps of height 1,

    t(u) = exp(-|u - c|^2 / (2 sigma^2)),    c = k / stride

with `k` the keypoint in pixels of the network's input (0 is the middle of the first pixel), `u` and `sigma`
in pixels of the map. The loss is the mean squared error of the maps; those of keypoints that are not visible
count as zero in the mean (Xiao, Wu and Wei, "Simple baselines for human pose estimation", arXiv:1804.06208).

Back: the largest value's pixel `m`, and along each axis the vertex of the parabola through the logarithms of
three values,

    d = (log h(m+1) - log h(m-1)) / (2 (2 log h(m) - log h(m+1) - log h(m-1))),    k = stride (m + d)

which is exact for a Gaussian (the second-order expansion of Zhang et al., "Distribution-aware coordinate
representation", arXiv:1910.06278, along each axis by itself). `d` is 0 at the border of the map, and where a
neighbour is not above zero; it is at most half a pixel.

    pixel error   |k_predicted - k_true|, in pixels of the image that was read, mean over visible keypoints
    PCK           the share of visible keypoints whose pixel error is at most alpha L, L a length of the
                  example (Yang and Ramanan, "Articulated human detection with flexible mixtures of parts",
                  2013)
"""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_maps(keypoints: Tensor, size: tuple[int, int], stride: int, sigma: float) -> Tensor:
    """The maps that a network is taught.

    Args:
        keypoints: `(batch, keypoints, 2)`, x and y in pixels of the network's input.
        size: Height and width of a map.
        stride: Pixels of the input to a pixel of the map.
        sigma: Of the bump, in pixels of the map.

    Returns:
        `(batch, keypoints, height, width)` in the dtype of `keypoints`.
    """
    centre = keypoints / stride
    rows, columns = (torch.arange(n, dtype=centre.dtype, device=centre.device) for n in size)
    # exp(-|u - c|^2 / (2 sigma^2)) is a product of one factor a coordinate
    along_x = torch.exp(-((columns - centre[..., :1]) ** 2) / (2.0 * sigma**2))
    along_y = torch.exp(-((rows - centre[..., 1:]) ** 2) / (2.0 * sigma**2))
    maps: Tensor = along_y[..., :, None] * along_x[..., None, :]
    return maps


def heat_map_loss(maps: Tensor, targets: Tensor, visible: Tensor) -> Tensor:
    """The mean squared error of the maps, with those of invisible keypoints as zero.

    Args:
        maps: The network's, `(batch, keypoints, height, width)`.
        targets: Of the same shape.
        visible: `(batch, keypoints)`: 1 or 0.
    """
    # mean over batch, keypoints and pixels of v (h - t)^2
    return ((maps - targets).square().mean((2, 3)) * visible).mean()


def decode(maps: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The keypoints that maps show.

    Args:
        maps: `(batch, keypoints, height, width)`.
        stride: Pixels of the network's input to a pixel of the map.

    Returns:
        Keypoints `(batch, keypoints, 2)`, x and y in pixels of the network's input, and the largest value of
        each map `(batch, keypoints)`.
    """
    height, width = maps.shape[2:]
    score, index = maps.flatten(2).max(dim=2)
    row, column = index // width, index % width
    # the row and the column through the largest value, (batch, keypoints, n)
    across = _vertex(maps.gather(2, row[..., None, None].expand(-1, -1, 1, width))[:, :, 0], column)
    down = _vertex(maps.gather(3, column[..., None, None].expand(-1, -1, height, 1))[..., 0], row)
    return stride * torch.stack((column + across, row + down), dim=-1), score


def _vertex(line: Tensor, place: Tensor) -> Tensor:
    """Where the parabola in the logarithms peaks, from `place` `(...)`, the largest of `line` `(..., n)`."""
    last = line.shape[-1] - 1
    around = (place[..., None] + torch.arange(-1, 2, device=place.device)).clamp(0, last)
    values = line.gather(-1, around)
    inner = (place > 0) & (place < last) & (values > 0).all(-1)
    before, peak, after = torch.where(inner[..., None], values, 1.0).log().unbind(-1)
    curvature = 2.0 * peak - before - after
    # d = (log h(m+1) - log h(m-1)) / (2 (2 log h(m) - log h(m+1) - log h(m-1)))
    flat = curvature <= 0.0  # three equal values
    vertex = (after - before) / (2.0 * torch.where(flat, 1.0, curvature))
    return torch.where(flat, 0.0, vertex)


def pixel_errors(predicted: Tensor, true: Tensor, scale: Tensor) -> Tensor:
    """Distances between keypoints `(batch, keypoints, 2)`, in pixels of the images that were read.

    Args:
        predicted: In pixels of the network's input.
        true: As `predicted`.
        scale: Pixels of the image to one of the network's input along x and y, `(batch, 2)`.

    Returns:
        `(batch, keypoints)`.
    """
    distances: Tensor = torch.linalg.vector_norm((predicted - true) * scale[:, None], dim=-1)
    return distances


def correct_keypoints(errors: Tensor, lengths: Tensor, fraction: float) -> Tensor:
    """Which keypoints PCK counts as correct.

    Args:
        errors: `(batch, keypoints)`.
        lengths: L of each example, `(batch,)`, in the same pixels.
        fraction: alpha.

    Returns:
        `(batch, keypoints)`, bool.
    """
    # |k_predicted - k_true| <= alpha L
    correct: Tensor = errors <= fraction * lengths[:, None]
    return correct
