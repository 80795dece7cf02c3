"""The picture of a run: pictures with the keypoints that are there and those that were found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def overlay(pictures: Tensor, true: Tensor, visible: Tensor, found: Tensor, names: Sequence[str]) -> Figure:
    """Pictures side by side; a circle is a true keypoint, a cross one that was found.

    Args:
        pictures: `(n, 3, height, width)`, values from 0 to 255.
        true: `(n, keypoints, 2)`, in pixels of the pictures.
        visible: `(n, keypoints)`.
        found: As `true`.
        names: Of the keypoints.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(3, len(pictures))
    rows = -(-len(pictures) // columns)
    height, width = pictures.shape[2:]
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows * height / width + 0.5), layout="constrained")
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    for number, picture in enumerate(pictures):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(picture.byte().permute(1, 2, 0).cpu().numpy())
        axes.set_axis_off()
        for index, name in enumerate(names):
            colour = palette(index % palette.N)
            if visible[number, index] > 0.0:
                axes.plot(*true[number, index].tolist(), "o", mec=colour, mfc="none", ms=8)
            axes.plot(*found[number, index].tolist(), "x", color=colour, ms=6, label=name)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(names)))
    return figure
