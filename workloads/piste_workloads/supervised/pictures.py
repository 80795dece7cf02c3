"""Pictures of a run: what it has reached against what that has cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from piste.workload import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, float]]  # one an epoch


def draw(run: Run, rows: Rows, score: str) -> None:
    """Keeps the pictures of a run.

    They are the held-out parts' score against gradient evaluations and against seconds of training, and the
    norm of the PSF over the epochs, where the optimizer has one.

    Args:
        run: The run.
        rows: The metrics of each epoch, with `seconds`, all those of training so far.
        score: The score's name.
    """
    parts = [part for part in ("valid", "test") if sum(f"{part}/{score}" in row for row in rows) > 1]
    for name, key, label in (
        ("gradient-evaluations", "cost/gradient_evaluations", "gradient evaluations"),
        ("seconds", "seconds", "seconds of training"),
    ):
        if parts:
            series = {part: (key, f"{part}/{score}") for part in parts}
            run.figure(f"{score}-{name}", curves(rows, series, label, score))
    if any("optimizer/psf_norm" in row for row in rows):
        series = {"PSF": ("cost/gradient_evaluations", "optimizer/psf_norm")}
        run.figure("psf-norm", curves(rows, series, "gradient evaluations", "norm of the PSF"))


def curves(rows: Rows, series: dict[str, tuple[str, str]], across: str, up: str) -> Figure:
    """Curves of some keys of the rows against others.

    Args:
        rows: The points; a row without both keys of a curve is left out of it.
        series: By the name of a curve, its keys across and up.
        across: The label of the axis across.
        up: The label of the axis up.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, (x, y) in series.items():
        points = [(row[x], row[y]) for row in rows if x in row and y in row]
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(xlabel=across, ylabel=up)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
