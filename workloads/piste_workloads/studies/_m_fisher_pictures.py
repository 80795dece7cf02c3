"""Pictures of the study of M-FISHER: delays against their bound, and false alarms against delays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from piste.home import home
from piste.verdicts import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def keep(name: str, figure: Figure) -> None:
    """Writes a picture beside the study's verdicts."""
    path = home() / "studies" / f"m-fisher-{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def delays(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], factor: float) -> Figure:
    """Mean delays against log(2 / level) / gain.

    Args:
        lines: By label, the bounds and the delays of several levels.
        factor: Of the bound, drawn beside the bound itself.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    axes = figure.subplots()
    for label, (bounds, found) in lines.items():
        axes.plot(bounds, found, marker="o", label=label)
    longest = max(max(bounds) for bounds, _ in lines.values())
    for slope, style, label in ((1.0, ":", "the bound"), (factor, "--", f"{factor:g} times the bound")):
        axes.plot([0.0, longest], [0.0, slope * longest], style, color="grey", label=label)
    axes.set(
        xlabel="log(2 / level) / gain (events)",
        ylabel="mean delay (events)",
        title="Delay of a shift at the start, levels 0.1 to 1e-6",
        xlim=(0.0, None),
        ylim=(0.0, None),
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def false_alarms(lines: Mapping[str, Sequence[tuple[float, Estimate]]], ours: float, level: float) -> Figure:
    """Shares of streams with a false alarm against the mean delay of a late shift, with 95 % intervals.

    Args:
        lines: By detector, its delay and its share at one setting or several.
        ours: The delay that the others are compared at.
        level: What is promised at that delay.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        found = sorted(point for point in points if math.isfinite(point[0]))
        delays, shares = [delay for delay, _ in found], [share for _, share in found]
        around = [[s.figure - s.low for s in shares], [s.high - s.figure for s in shares]]
        axes.errorbar(delays, [s.figure for s in shares], yerr=around, marker="o", capsize=3, label=label)
    axes.axhline(level, linestyle="--", color="grey", label=f"{level:.0%} of streams")
    axes.axvline(ours, linestyle=":", color="grey", label=f"our delay at the level {level:g}")
    axes.set(
        xlabel="mean delay of one standard deviation after 1,000 events (events)",
        ylabel="streams with a false alarm",
    )
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    return figure
