"""A sweep's pictures, as PNG files.

Every function takes the sweep's trials, its `[sweep]` and a path; it returns the path, or None where there is
nothing to draw. An axis of the objective ends where the worst tenth would squeeze the others; what is beyond
it, failed or diverged is shown as such.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

from piste import comparison
from piste.comparison import Cell, Mode
from piste.ledger.tables import TrialRecord
from piste.reporting import cell
from piste.space import Entry, Sweep, Value
from piste.sweep_tables import headings
from piste.thresholds import Converged
from piste.thresholds import thresholds as thresholds_of

GREY = "0.7"
ABSENT = -0.12  # where an axis of parallel coordinates has the cells without its key
MOST_STRATA = 24
MOST_LINES = 1000  # of parallel coordinates; more are a blot
LONG = 300  # trials from which the best so far is drawn on a logarithmic axis


class Scale(NamedTuple):
    """An axis of numbers."""

    low: float
    high: float
    logarithmic: bool = False
    whole: bool = False  # whole numbers alone

    def place(self, value: float) -> float:
        """Where a value is between the ends, 0 to 1; beyond them at the end."""
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values between the ends; the ends themselves where there are fewer than two."""
        decades = self.logarithmic and self.high > 30.0 * self.low
        locator = LogLocator(numticks=8) if decades else MaxNLocator(5, integer=self.whole)
        inside = [float(t) for t in locator.tick_values(self.low, self.high) if self.low <= t <= self.high]
        return inside if len(inside) > 1 else [self.low, self.high]

    def norm(self) -> Normalize:
        """The same for colours."""
        return (LogNorm if self.logarithmic else Normalize)(self.low, self.high, clip=True)


def _objective(found: Sequence[Cell], mode: Mode) -> Scale | None:
    """The scale of the means of cells that did not fail; None where there is none."""
    means = np.array([c.mean for c in found if c.n and not c.failed])
    return _scale(means, mode) if means.size else None


def _scale(values: NDArray[np.float64], mode: Mode) -> Scale:
    """From the best to the worst that is shown; logarithmic where they are 50 times apart."""
    best, near, worst = np.quantile(values, [0.0, 0.9, 1.0] if mode == "min" else [1.0, 0.1, 0.0])
    logarithmic = bool(values.min() > 0.0 and max(best, near) / 50.0 > min(best, near))
    if logarithmic:
        best, near, worst = np.log([best, near, worst])
    end = near if abs(worst - best) > 3.0 * abs(near - best) > 0.0 else worst
    # a little room, which also keeps rounding from pushing the best one off its axis
    room = 0.02 * abs(end - best) or 0.5
    low, high = min(best, end) - room, max(best, end) + room
    return Scale(math.exp(low), math.exp(high), True) if logarithmic else Scale(float(low), float(high))


def _searched(found: Sequence[Cell], section: Sweep) -> list[str]:
    """The keys of which the cells have more than one value."""
    return [k for k in section.entries if len({str(c.values.get(k)) for c in found}) > 1]


def _numbers(entry: Entry, column: Iterable[Any]) -> Scale:
    bounds = entry.log_uniform or entry.uniform or entry.integer
    low, high = bounds or (min(column), max(column))
    return Scale(low, high, entry.log_uniform is not None, entry.integer is not None)


def _categories(entry: Entry) -> dict[Value, int] | None:
    """An entry's values with their places; None where they are numbers of a range."""
    if entry.integer is not None or entry.finite is None:
        return None
    return {value: place for place, value in enumerate(entry.finite)}


def _short(value: Value) -> str:
    text = cell(value)
    return text if len(text) <= 14 else f"{text[:6]}…{text[-7:]}"


def parallel_coordinates(trials: Iterable[TrialRecord], section: Sweep, path: Path) -> Path | None:
    """One line a cell through its values and its objective, the best on top, the failed ones grey.

    Of more than 1,000 cells it has every second, third, ... in the order from best to worst.
    """
    every = comparison.cells(trials, section.mode)
    found = every[:: math.ceil(len(every) / MOST_LINES) or 1]
    keys, objective = _searched(found, section), _objective(found, section.mode)
    if objective is None or not keys:
        return None
    figure = Figure(figsize=(2.0 + 1.7 * len(keys), 4.8), layout="constrained")
    axis = figure.add_subplot()
    heights = np.empty((len(found), len(keys) + 1))
    for place, key in enumerate(keys):
        column = [c.values.get(key) for c in found]
        heights[:, place], ticks = _heights(section.entries[key], column)
        _upright(axis, place, ticks)
    heights[:, -1] = [objective.place(c.mean) if c.n else math.nan for c in found]
    _upright(axis, len(keys), [(objective.place(tick), cell(tick)) for tick in objective.ticks()])

    failed = np.array([c.failed > 0 or not c.n for c in found])
    style: dict[str, Any] = {"alpha": max(0.06, min(0.9, 40.0 / len(found))), "linewidths": 1.2}
    places = np.broadcast_to(np.arange(len(keys) + 1), heights.shape)
    lines = np.stack([places, heights], axis=-1)
    axis.add_collection(LineCollection([*lines[failed, :-1]], colors=GREY, zorder=1, **style))
    colours = matplotlib.colormaps["viridis" if section.mode == "min" else "viridis_r"]
    good = LineCollection([*lines[~failed][::-1]], cmap=colours, norm=objective.norm(), zorder=2, **style)
    good.set_array(np.array([c.mean for c in found])[~failed][::-1])
    axis.add_collection(good)
    names = [*headings(keys).values(), section.metric]
    axis.set_xticks(range(len(names)), names)
    axis.set(xlim=(-0.45, len(keys) + 0.05), ylim=(min(0.0, np.nanmin(heights)) - 0.04, 1.04), yticks=[])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    grey = f", {failed.sum()} failed or diverged (grey)" if failed.any() else ""
    some = f"{len(found)} of " if len(found) < len(every) else ""
    axis.set_title(f"{some}{len(every)} cells{grey}", fontsize=10)
    return _save(figure, path)


def _heights(entry: Entry, column: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where the values of a key are on its axis, 0 to 1, and its ticks."""
    present = [value for value in column if value is not None]
    categories = _categories(entry)
    if categories is None:
        scale = _numbers(entry, present)
        ticks = [(scale.place(tick), cell(tick)) for tick in scale.ticks()]
        heights = [ABSENT if value is None else scale.place(value) for value in column]
    else:
        top = max(1, len(categories) - 1)
        ticks = [(place / top, _short(value)) for value, place in categories.items()]
        heights = [ABSENT if v is None else categories[comparison.plain(v)] / top for v in column]
    return heights, ticks + ([(ABSENT, "absent")] if len(present) < len(column) else [])


def _upright(axis: Axes, place: float, ticks: Sequence[tuple[float, str]]) -> None:
    """An axis of parallel coordinates."""
    axis.plot([place, place], [0.0, 1.0], color="0.3", linewidth=0.8, zorder=3)
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    for height, text in ticks:
        axis.annotate(
            text, (place, height), (-4, 0), textcoords="offset points", ha="right", va="center",
            fontsize=7, zorder=4, bbox=box,
        )  # fmt: skip


def importances(trials: Sequence[TrialRecord], section: Sweep, path: Path) -> Path | None:
    """How much each key decides whether a trial is among the best, as bars."""
    found = comparison.importances(trials, section)
    if not found:
        return None
    names = headings(list(section.entries))
    figure = Figure(figsize=(6.4, 1.2 + 0.32 * len(found)), layout="constrained")
    axis = figure.add_subplot()
    bars = axis.barh([names[key] for key in found], list(found.values()), color="C0")
    axis.bar_label(bars, [f"{share:.0%}" for share in found.values()], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlim=(0.0, 1.12 * max(found.values())), title="importance (PED-ANOVA)")
    left_out = [f"{names[k]} ({why})" for k, why in comparison.unranked(trials, section).items()]
    axis.set_xlabel("left out: " + ", ".join(left_out) if left_out else "", fontsize=8, wrap=True)
    return _save(figure, path)


def best_so_far(trials: Iterable[TrialRecord], section: Sweep, path: Path) -> Path | None:
    """The best trial of each group against its trials and its computing seconds."""
    members = comparison.groups(trials, section)
    curves = {name: comparison.best_so_far(of, section.mode) for name, of in members.items()}
    curves = {name: curve for name, curve in curves.items() if np.isfinite(curve.best).any()}
    if not curves:
        return None
    figure, axes = _two_panels(section.metric)
    scale = _scale(np.concatenate([c.best[np.isfinite(c.best)] for c in curves.values()]), section.mode)
    for name, look in _looks(curves, section).items():
        best = np.clip(curves[name].best, scale.low, scale.high)
        for axis, spent in zip(axes, curves[name][:2], strict=True):
            axis.step(spent, best, where="post", color=look.colour, linestyle=look.line, label=name)
    axes[0].set_yscale("log" if scale.logarithmic else "linear")
    if max(curve.trials.size for curve in curves.values()) > LONG:
        timed = min(curve.seconds[0] for curve in curves.values()) > 0.0
        for axis in axes if timed else axes[:1]:
            axis.set_xscale("log")
    if section.target is not None:
        for axis in axes:
            axis.axhline(section.target, color="0.4", linestyle="--", linewidth=0.9, label="target")
    _legend(figure, axes[0])
    return _save(figure, path)


def time_to_target(trials: Iterable[TrialRecord], section: Sweep, path: Path) -> Path | None:
    """The fraction of each group's cells whose mean has reached `sweep.target`, against what was spent."""
    tuned = comparison.tuning(trials, section)
    if section.target is None or not tuned:
        return None
    figure, axes = _two_panels(f"cells with {section.metric} at {cell(section.target)} or better")
    sign = 1.0 if section.mode == "min" else -1.0
    cells = {group.name: sorted(group.cells, key=lambda c: c.number) for group in tuned}
    for name, look in _looks(cells, section).items():
        there = [not c.failed and sign * c.mean <= sign * section.target for c in cells[name]]
        reached = np.cumsum([False, *there]) / len(there)
        spent = np.cumsum([(0.0, 0.0), *((c.ended, c.seconds) for c in cells[name])], axis=0)
        for axis, x in zip(axes, spent.T, strict=True):
            axis.step(x, reached, where="post", color=look.colour, linestyle=look.line, label=name)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].yaxis.set_major_formatter(lambda fraction, _: f"{fraction:.0%}")
    _legend(figure, axes[0])
    return _save(figure, path)


def _two_panels(label: str) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    axes[0].set(xlabel="trials of the group", ylabel=label)
    axes[1].set(xlabel="computing seconds of the group")
    for axis in axes:
        axis.grid(alpha=0.2)
        axis.locator_params(axis="x", nbins=6)
    return figure, axes


def parameters(trials: Iterable[TrialRecord], section: Sweep, path: Path) -> Path | None:
    """The objective of every cell against each key, one panel a key, coloured by group."""
    found = comparison.cells(trials, section.mode)
    keys, objective = _searched(found, section), _objective(found, section.mode)
    if objective is None or not keys:
        return None
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(1.0 + 3.6 * columns, 0.8 + 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    members = comparison.groups(found, section)
    names, looks, generator = headings(keys), _looks(members, section), np.random.default_rng(0)
    size = max(4.0, min(18.0, 3000.0 / len(found)))
    edge = 1.06 if section.mode == "min" else -0.06
    for panel, key in zip(panels, keys, strict=False):
        for name, look in looks.items():
            here = [c for c in members[name] if c.values.get(key) is not None]
            x = _across(panel, section.entries[key], [c.values[key] for c in here], generator)
            shown = np.array([_within(c, objective) for c in here], dtype=bool)
            y = np.array([objective.place(c.mean) for c in here if _within(c, objective)])
            style = {"color": look.colour, "marker": look.marker, "linewidths": 0.0, "alpha": 0.7}
            panel.scatter(x[shown], y, s=size, label=name, **style)
            beyond = np.full(len(here) - len(y), edge)
            panel.scatter(x[~shown], beyond, color="0.4", marker="x", s=size, linewidths=0.8)
        panel.set_xlabel(names[key])
        panel.grid(alpha=0.2)
    for panel in panels[len(keys) :]:
        panel.remove()
    for panel in panels[: len(keys) : columns]:
        panel.set_ylabel(section.metric)
    panels[0].set_yticks([objective.place(t) for t in objective.ticks()], [*map(cell, objective.ticks())])
    panels[0].set_ylim(-0.12, 1.12)
    if not all(_within(c, objective) for c in found):
        figure.suptitle("crosses: failed, diverged, or beyond the axis", fontsize=9)
    _legend(figure, panels[0])
    return _save(figure, path)


def _within(one: Cell, objective: Scale) -> bool:
    return not one.failed and objective.low <= one.mean <= objective.high


def _across(
    panel: Axes, entry: Entry, values: Sequence[Any], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Where values are on a horizontal axis, which is set up for them; categories are spread a little."""
    categories = _categories(entry)
    if categories is None:
        panel.set_xscale("log" if entry.log_uniform else "linear")
        if entry.integer is not None:
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return np.array(values, dtype=np.float64)
    tilted = len(categories) > 8 or sum(len(_short(value)) for value in categories) > 30
    turned: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if tilted else {}
    panel.set_xticks(range(len(categories)), [*map(_short, categories)], fontsize=8, **turned)
    places = np.array([categories[comparison.plain(value)] for value in values])
    return places + generator.uniform(-0.25, 0.25, size=len(values))


def thresholds(
    trials: Iterable[TrialRecord], section: Sweep, path: Path, converged: Converged
) -> Path | None:
    """The fraction of seeds that converge against the bisected parameter, its bracket shaded."""
    if section.bisect is None:
        return None
    found = thresholds_of(trials, section, converged)[:MOST_STRATA]
    if not found:
        return None
    entry = section.entries[section.bisect.parameter]
    figure = Figure(figsize=(7.0, 0.9 + 1.3 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 1, sharex=True, sharey=True, squeeze=False).ravel()
    names = headings(list(section.entries))
    for panel, one in zip(panels, found, strict=True):
        x, fractions = [p.value for p in one.probes], np.array([p.fraction for p in one.probes])
        ends = np.array([p.interval for p in one.probes])
        reach = np.abs(ends.T - fractions)
        panel.errorbar(x, fractions, yerr=reach, fmt="o", markersize=4, linewidth=1, capsize=2, color="C0")
        if one.bracket is not None:
            panel.axvspan(*sorted(probe.value for probe in one.bracket), color="C1", alpha=0.35, linewidth=0)
        said = "no edge" if one.threshold is None else f"edge at {cell(one.threshold)}"
        which = ", ".join(f"{names[k]} {cell(v)}" for k, v in one.values.items())
        panel.set_title(f"{which}: {said}" if which else said, fontsize=9, loc="left")
        panel.grid(alpha=0.2)
    panels[0].set(ylim=(-0.08, 1.08), xscale="log" if entry.log_uniform else "linear")
    panels[0].set_yticks([0.0, 0.5, 1.0], ["0", "½", "1"])
    panels[-1].set_xlabel(names[section.bisect.parameter])
    figure.supylabel("fraction of seeds that converge", fontsize=9)
    return _save(figure, path)


class Look(NamedTuple):
    """How a group is drawn."""

    colour: str
    line: str
    marker: str


def _looks(names: Iterable[str], section: Sweep) -> dict[str, Look]:
    """The groups that are there, in the order of the recipe, each with ten colours' next look."""
    key, there = comparison.group_key(section), set(names)
    every = ["all"] if key is None else [str(value) for value in section.entries[key].finite or ()]
    looks = {name: Look(f"C{i % 10}", ("-", "--", ":", "-.")[i // 10 % 4], "o^sD"[i // 10 % 4])
             for i, name in enumerate(every)}  # fmt: skip
    return {name: look for name, look in looks.items() if name in there}


def _legend(figure: Figure, axis: Axes) -> None:
    """One legend for all panels, on their right; none where there is one group."""
    handles, names = axis.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=8)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
