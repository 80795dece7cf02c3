"""Heat maps, there and back, and what is measured on them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from piste_workloads.pose.heatmaps import (
    correct_keypoints,
    decode,
    gaussian_maps,
    heat_map_loss,
    pixel_errors,
)

DOUBLE = torch.float64


def keypoints(count: int, margin: float = 4.0) -> Tensor:
    """Somewhere in a picture of 40 x 60 pixels, `(count, 3, 2)`."""
    drawn = torch.rand(count, 3, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    return margin + drawn * (torch.tensor([60.0, 40.0], dtype=DOUBLE) - 1.0 - 2.0 * margin)


def test_a_map_is_the_gaussian() -> None:
    maps = gaussian_maps(torch.tensor([[[8.0, 5.0]]], dtype=DOUBLE), (6, 9), stride=2, sigma=1.5)
    assert maps.shape == (1, 1, 6, 9)
    for row, column in ((0, 0), (2, 4), (5, 8)):
        squared = (column - 4.0) ** 2 + (row - 2.5) ** 2
        assert float(maps[0, 0, row, column]) == pytest.approx(math.exp(-squared / (2 * 1.5**2)), rel=1e-12)


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_decoding_undoes_a_gaussian(stride: int, sigma: float) -> None:
    true = keypoints(50)
    maps = gaussian_maps(true, (40 // stride, 60 // stride), stride, sigma)
    found, score = decode(0.3 * maps, stride)
    # A keypoint that is nearest to the outermost pixels of the map is found to that pixel alone.
    place = (true / stride).round()
    last = torch.tensor([60 // stride - 1, 40 // stride - 1])
    inner = ((place > 0) & (place < last)).all(-1)
    assert int(inner.sum()) > 100
    torch.testing.assert_close(found[inner], true[inner], rtol=0.0, atol=1e-9)
    assert float((found - true).abs().max()) <= stride / 2 + 1e-9
    assert float(score.max()) <= 0.3


def test_decoding_where_there_is_no_bump() -> None:
    flat = torch.full((1, 3, 5, 7), 0.5)
    flat[0, 1] = -1.0
    flat[0, 2, 2, 3] = 1.0  # its neighbours are not above zero in the third map
    flat[0, 2, 2, 2] = -0.1
    found, score = decode(flat, 2)
    assert found.isfinite().all()
    assert found[0].tolist()[:2] == [[0.0, 0.0], [0.0, 0.0]]
    assert found[0, 2, 0] == 6.0
    assert score[0].tolist() == [0.5, -1.0, 1.0]


def test_a_sub_pixel_vertex_is_at_most_half_a_pixel_away() -> None:
    maps = torch.rand(20, 4, 9, 11, generator=torch.Generator().manual_seed(3))
    found, _ = decode(maps, 1)
    index = maps.flatten(2).argmax(2)
    peaks = torch.stack((index % 11, index // 11), -1)
    assert float((found - peaks).abs().max()) <= 0.5


def test_the_loss_counts_visible_keypoints_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    maps, targets = (torch.randn(4, 3, 5, 6, generator=generator, dtype=DOUBLE) for _ in range(2))
    ones = torch.ones(4, 3, dtype=DOUBLE)
    torch.testing.assert_close(
        heat_map_loss(maps, targets, ones), torch.nn.functional.mse_loss(maps, targets)
    )
    visible = ones.clone()
    visible[:, 1] = 0.0
    expected = torch.nn.functional.mse_loss(maps[:, ::2], targets[:, ::2]) * 2.0 / 3.0
    torch.testing.assert_close(heat_map_loss(maps, targets, visible), expected)
    # A batch that workers share: the mean of their losses is the loss of the whole.
    halves = [heat_map_loss(maps[i::2], targets[i::2], visible[i::2]) for i in range(2)]
    torch.testing.assert_close(sum(halves) / 2.0, heat_map_loss(maps, targets, visible))


def test_errors_are_in_pixels_of_the_image_that_was_read() -> None:
    true = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [2.0, 2.0]]])
    predicted = true + torch.tensor([[[3.0, 0.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]]])
    errors = pixel_errors(predicted, true, torch.tensor([[1.0, 1.0], [5.0, 2.0]]))
    assert errors.tolist() == [[3.0, 5.0], [0.0, 2.0]]
    # PCK at a fifth of 20 and of 5 pixels
    correct = correct_keypoints(errors, torch.tensor([20.0, 5.0]), 0.2)
    assert correct.tolist() == [[True, False], [True, False]]
