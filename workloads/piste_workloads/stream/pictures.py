"""A picture of streams of images: how many of each batch are right, by adapter, as the stream goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from piste_workloads.stream.config import Config
from piste_workloads.stream.tally import accuracies

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOW = 200  # images that a point is the mean of; single batches jump by a tenth


def adaptation(
    config: Config, streams: Sequence[Mapping[str, Any]], alarms: Sequence[Mapping[str, Any]]
) -> Figure:
    """Accuracy over a stream by adapter, with the corruption and the first alarm.

    Args:
        config: The recipe.
        streams: `number`, `name` and `state` of each stream, among others.
        alarms: `sequence` of each alarm, among others.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.6), layout="constrained")
    axes = figure.subplots()
    lines = {stream["name"]: accuracies(stream["state"]) for stream in streams}
    section = config.images
    draw(axes, lines, (config.source.onset, section.until), [alarm["sequence"] for alarm in alarms])
    axes.set_title(f"{section.dataset}, {section.corruption} of severity {section.severity:g}", loc="left")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw(
    axes: Axes,
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    corrupted: tuple[int, int],
    alarms: Sequence[int],
) -> None:
    """The lines of some adapters, each the mean of the batches that end in the last 200 images.

    Args:
        axes: Where.
        lines: By adapter, of each batch the number of its last image, and its accuracy.
        corrupted: The first image that is corrupted, and the first that no longer is.
        alarms: The numbers of the images that raised one.
    """
    for name, (ends, values) in lines.items():
        places, right = np.array(ends), np.array(values)
        smooth = [right[(places > end - WINDOW) & (places <= end)].mean() for end in places]
        axes.plot(places, smooth, label=name, color="black" if name == "none" else None, linewidth=1.4)
    last = max(ends[-1] for ends, _ in lines.values())
    if corrupted[0] < last:
        axes.axvspan(corrupted[0], min(corrupted[1], last), color="grey", alpha=0.12, label="corrupted")
    if alarms:
        axes.axvline(min(alarms), linestyle=":", color="grey", label="first alarm")
    axes.set(xlabel="images", ylabel=f"accuracy of the last {WINDOW} images", xlim=(0, last))
    axes.grid(alpha=0.3)
