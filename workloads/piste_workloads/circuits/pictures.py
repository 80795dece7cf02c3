"""Pictures of a run: its likelihood, samples, completed halves, and the tree that it learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from piste.workload import Run
from piste_algorithms.circuits import Circuit
from piste_workloads.circuits.config import Config
from piste_workloads.circuits.progress import Progress
from piste_workloads.circuits.rows import MISSING, Encoding, Rows, evenly
from piste_workloads.circuits.spelling import spell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[Mapping[str, float]]  # a mapping a validation, with the keys of `AXES`

AXES = {"epoch": "epochs", "cost/updates": "updates", "time/train_s": "seconds of updates"}


def draw(run: Run, config: Config, circuit: Circuit, rows: Rows, progress: Progress, step: int) -> None:
    """Keeps the pictures and tables of a run that has ended."""
    series = {part: (progress.curve, f"{part}/log_likelihood") for part in ("train", "valid")}
    run.figure("log-likelihood", curves(series, config.rule.name), step)
    description = circuit.structure.description
    if "parents" in description:
        run.figure("tree", tree(description["parents"], rows.encoding, description.get("information")), step)
    if config.train.samples:
        _draw_samples(run, circuit, rows, config.train.samples, step)


def curves(series: Mapping[str, tuple[Curve, str]], title: str) -> Figure:
    """Log-likelihoods of runs, or of parts of one, against epochs, updates and seconds.

    Args:
        series: By name, the points of a curve and the key of the log-likelihood in them.
        title: Above the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        for name, (points, up) in series.items():
            axes.plot([p[key] for p in points], [p[up] for p in points], marker=".", label=name)
        axes.set(xlabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=not key.startswith("time/")))
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="log-likelihood (nats a row)")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title)
    return figure


def _draw_samples(run: Run, circuit: Circuit, rows: Rows, count: int, step: int) -> None:
    """Rows that the circuit samples, and test rows of which it completes the second half."""
    encoding = rows.encoding
    generator = torch.Generator(circuit.device).manual_seed(run.seed)
    sampled = circuit.sample(count, generator).cpu()
    whole = torch.from_numpy(evenly(rows.parts["test"].numpy(), count))
    given = without_half(whole, encoding)
    possible = torch.isfinite(circuit.log_likelihood(given))
    whole, given = whole[possible.cpu()], given[possible.cpu()]
    drawn, likely = sampled[:0], sampled[:0]
    if len(given) > 0:
        drawn = circuit.conditional_sample(given, generator).cpu()
        likely = circuit.mpe(given).cpu()
    if is_image(encoding):
        run.figure("samples", grid(sampled, encoding), step)
        if len(given) > 0:
            four = torch.stack([whole, given, drawn, likely], 1).flatten(0, 1)
            run.figure("in-painting", grid(four, encoding, columns=8, titles=2 * COMPLETED), step)
        return
    run.table("samples", [{"sample": text} for text in spell(sampled, encoding)], step)
    columns = [spell(part, encoding) for part in (whole, given, drawn, likely)]
    completed = [dict(zip(COMPLETED, texts, strict=True)) for texts in zip(*columns, strict=True)]
    run.table("in-painting", completed, step)


COMPLETED = ("whole", "given", "sampled", "most probable")


def without_half(x: Tensor, encoding: Encoding) -> Tensor:
    """Rows without the lower half of an image, or the second half of a line; a label is missing, too."""
    given = x.clone()
    if is_image(encoding):
        channels, height, width = encoding.shape
        given.view(-1, channels, height, width)[:, :, height // 2 :] = MISSING
    else:
        given[:, encoding.shape[0] // 2 :] = MISSING
    return given


def is_image(encoding: Encoding) -> bool:
    """Whether the variables are pixels."""
    return len(encoding.shape) == 3


def grid(x: Tensor, encoding: Encoding, columns: int | None = None, titles: Sequence[str] = ()) -> Figure:
    """Images in a grid; missing pixels are red.

    Args:
        x: `(images, variables)`.
        encoding: Of images.
        columns: Of the grid; None: as many as rows.
        titles: Above the columns.
    """
    from matplotlib.figure import Figure

    columns = columns or max(1, int(np.ceil(np.sqrt(len(x)))))
    lines = -(-len(x) // columns)
    figure = Figure(figsize=(columns, lines + 0.3 * bool(titles)), layout="constrained")
    for place, axes in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
        axes.set_axis_off()
        if place < len(x):
            axes.imshow(_shades(x[place], encoding), interpolation="nearest")
        if place < len(titles):
            axes.set_title(titles[place], fontsize=8)
    return figure


def _shades(row: Tensor, encoding: Encoding) -> np.ndarray[Any, np.dtype[np.float64]]:
    """An image `(height, width, 3)` from 0 to 1."""
    image = row.view(encoding.shape).permute(1, 2, 0)
    shades = (image.double() / (encoding.categories - 1)).expand(-1, -1, 3).clone()
    shades[(image < 0).any(-1)] = torch.tensor([0.8, 0.2, 0.2], dtype=torch.float64)
    return shades.numpy()


def tree(parents: Sequence[int], encoding: Encoding, information: Sequence[float] | None = None) -> Figure:
    """The edges of a Chow-Liu tree or forest: between pixels, or as arcs over a line of variables.

    Args:
        parents: Of each variable; -1 for a root, which is red.
        encoding: Where the variables lie; the channels of an image lie in each other's places.
        information: Of each variable and its parent, in nats: the paler an edge, the less; None: not known,
            as of a circuit that an older version has saved.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 6.0 if is_image(encoding) else 3.0), layout="constrained")
    axes = figure.add_subplot()
    places = _places(len(parents), encoding)
    edges = [(child, parent) for child, parent in enumerate(parents) if parent >= 0]
    if is_image(encoding):
        lines = [places[list(edge)] for edge in edges]
        axes.set_aspect("equal")
        axes.invert_yaxis()
    else:
        lines = [_arc(places[child], places[parent]) for child, parent in edges]
        axes.set(xlabel="variable", yticks=[])
    drawn = LineCollection(lines, linewidths=0.8, colors="tab:blue")
    if information is not None and edges:
        drawn = LineCollection(lines, linewidths=1.0, cmap="YlGnBu", array=[information[c] for c, _ in edges])
        drawn.set_clim(vmin=0.0)
        figure.colorbar(drawn, ax=axes, label="mutual information (nats)", shrink=0.8)
    axes.add_collection(drawn)
    axes.plot(*places.T, "k.", markersize=2)
    axes.plot(*places[[child for child, parent in enumerate(parents) if parent < 0]].T, "r.")
    axes.set_title("the learned tree; red: roots")
    return figure


def _places(variables: int, encoding: Encoding) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Where each variable is drawn, `(variables, 2)`."""
    if is_image(encoding):
        channels, height, width = encoding.shape
        _, down, across = np.unravel_index(np.arange(variables), (channels, height, width))
        return np.stack([across, down], 1).astype(np.float64)
    return np.stack([np.arange(variables), np.zeros(variables)], 1).astype(np.float64)


def _arc(
    start: np.ndarray[Any, np.dtype[np.float64]], stop: np.ndarray[Any, np.dtype[np.float64]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Half a circle above a line, `(points, 2)`."""
    angles = np.linspace(0.0, np.pi, 24)
    middle, radius = (start[0] + stop[0]) / 2, abs(stop[0] - start[0]) / 2
    return np.stack([middle - radius * np.cos(angles), radius * np.sin(angles)], 1)
