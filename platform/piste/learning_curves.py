"""Learning curves of a comparison: one line a method, against steps and against seconds of training.

A workload says by its `curve` which of its metrics they show; of one that has none there is no such picture.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from piste import catalog, comparison
from piste.config import method_of
from piste.ledger import Ledger, TrialRecord
from piste.reporting import cell
from piste.space import Sweep
from piste.sweep_tables import headings
from piste.workload import Curve

Lines = Mapping[str, Sequence[str]]  # by label, the runs of a line: one a seed

FAR = 4.0  # times the middle line's distance from the best: an end as far is not among most of them
SQUEEZED = 4.0  # times the part where most lines end: below a longer axis there is one for that part


class Points(NamedTuple):
    """A line, `(points,)` each: steps, seconds, and the mean, least and largest value of its seeds."""

    steps: NDArray[np.float64]
    seconds: NDArray[np.float64]
    mean: NDArray[np.float64]
    least: NDArray[np.float64]
    largest: NDArray[np.float64]


def of_runs(ledger: Ledger, run_ids: Iterable[str], path: Path) -> Path | None:
    """Draws runs; those that differ in their seed alone are one line, called as what they learn with."""
    members: dict[str, list[str]] = defaultdict(list)
    for run_id in dict.fromkeys(run_ids):
        members[ledger.run(run_id).cell].append(run_id)
    methods = {key: method_of(ledger.run(runs[0]).config) for key, runs in members.items()}
    return draw(ledger, {label: members[key] for key, label in _labels(methods, members).items()}, path)


def _labels(methods: Mapping[str, Mapping[str, object]], members: Lines) -> dict[str, str]:
    """The name of each method; behind one that several have their differing settings, or else a run."""
    labels = {}
    for key, method in methods.items():
        alike = [other for other in methods.values() if other["name"] == method["name"]]
        settings = [
            f"{name} {cell(value)}"
            for name, value in method.items()
            if any(other.get(name) != value for other in alike)
        ]
        labels[key] = " ".join([str(method["name"]), ", ".join(settings)]).strip()
    count = Counter(labels.values())
    return {
        key: label if count[label] == 1 else f"{label} ({members[key][0]})" for key, label in labels.items()
    }


def of_sweep(ledger: Ledger, trials: Iterable[TrialRecord], section: Sweep, path: Path) -> Path | None:
    """Draws the best cell of each group of a sweep, its seeds that finished."""
    every = list(trials)
    cells = [one for one in comparison.cells(every, section.mode) if one.n]
    found = comparison.groups(cells, section)
    names, group = headings(list(section.entries)), comparison.group_key(section)
    searched = [
        k for k, e in section.entries.items() if k != group and (e.finite is None or len(e.finite) > 1)
    ]
    order = ["all"] if group is None else [str(value) for value in section.entries[group].finite or ()]
    lines = {}
    for name in (name for name in order if name in found):  # the same colours as in the other pictures
        best = found[name][0]
        settings = ", ".join(f"{names[k]} {cell(best.values[k])}" for k in searched if k in best.values)
        lines[f"{name} {settings}".strip()] = [
            t.run_id for t in every if t.cell == best.number and comparison.counts(t)
        ]
    return draw(ledger, lines, path)


def draw(ledger: Ledger, lines: Lines, path: Path) -> Path | None:
    """Draws lines into a PNG file; None where their workloads have no `curve` in common, or it no values."""
    workloads = {ledger.run(run_id).workload for runs in lines.values() for run_id in runs}
    curves = {getattr(catalog.load_workload(name), "curve", None) for name in workloads}
    curve = next(iter(curves), None)
    if curve is None or len(curves) > 1:
        return None
    found = {label: points_of(ledger, runs, curve) for label, runs in lines.items()}
    found = {label: points for label, points in found.items() if np.isfinite(points.mean).any()}
    if not found:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(found, curve, [len(lines[label]) for label in found]).savefig(path, dpi=130)
    return path


def points_of(ledger: Ledger, runs: Sequence[str], curve: Curve) -> Points:
    """The points of a line: the steps at which all of its runs have a value."""
    values = [dict(ledger.history(run_id, curve.metric)) for run_id in runs]
    clocks = [dict(ledger.history(run_id, curve.seconds)) for run_id in runs]
    steps = sorted(set.intersection(*map(set, values)))
    table = np.array([[each[step] for step in steps] for each in values])
    table[~np.isfinite(table)] = np.nan  # a line has a gap there
    seconds = np.array([[clock.get(step, np.nan) for step in steps] for clock in clocks])
    return Points(
        np.array(steps, dtype=np.float64), seconds.mean(0), table.mean(0), table.min(0), table.max(0)
    )


def figure(lines: Mapping[str, Points], curve: Curve, runs: Sequence[int] = (1,)) -> Figure:
    """The picture of some lines; a second row shows the part where most of them end, where it is small.

    Args:
        lines: By label.
        curve: What the values are.
        runs: How many runs each line is the mean of.
    """
    whole, near = _ranges(lines, curve)
    rows = [whole] if near is None else [whole, near]
    made = Figure(figsize=(10.0, 0.6 + 3.3 * len(rows)), layout="constrained")
    panels = made.subplots(len(rows), 2, sharex="col", sharey="row", squeeze=False)
    for (left, right), limits in zip(panels, rows, strict=True):
        for label, points in lines.items():
            _line(left, points.steps, points, label)
            _line(right, points.seconds, points, label)
        left.set_ylim(limits)
        for axis in (left, right):
            axis.grid(alpha=0.2)
    if near is not None:
        panels[1, 0].set_title("the same, where most of them end", fontsize=9, loc="left")
    panels[-1, 0].set_xlabel(curve.step)
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    panels[-1, 1].set_xlabel("seconds of training")
    made.supylabel(curve.label, fontsize=10)
    if max(runs) > 1:
        count = str(max(runs)) if len(set(runs)) == 1 else f"{min(runs)} to {max(runs)}"
        made.suptitle(f"means of {count} runs; pale: from their lowest to their highest", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    ends = {label: _end(points) for label, points in lines.items()}
    order = sorted(range(len(labels)), key=lambda at: ends[labels[at]], reverse=curve.mode == "max")
    made.legend(
        [handles[at] for at in order],
        [f"{labels[at]}: {ends[labels[at]]:.5g}" for at in order],
        loc="outside lower center",
        ncols=1 if max(map(len, labels)) > 40 else 3,
        frameon=False,
        fontsize=9,
        title="at the end, the best first",
        title_fontsize=9,
    )
    return made


def _line(axis: Axes, across: NDArray[np.float64], points: Points, label: str) -> None:
    (line,) = axis.plot(across, points.mean, marker=".", markersize=4, linewidth=1.3, label=label)
    axis.fill_between(across, points.least, points.largest, color=line.get_color(), alpha=0.15, linewidth=0)


def _end(points: Points) -> float:
    """The last finite value."""
    return float(points.mean[np.isfinite(points.mean)][-1])


def _ranges(
    lines: Mapping[str, Points], curve: Curve
) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """The range of all values; that of the ends, but for those far from the middle one, if it is small."""
    low = min(float(np.nanmin(points.least)) for points in lines.values())
    high = max(float(np.nanmax(points.largest)) for points in lines.values())
    ends = np.array([_end(points) for points in lines.values()])
    if curve.mode == "max":
        best, top = max(float(np.nanmax(points.mean)) for points in lines.values()), high
    else:
        best, top = min(float(np.nanmin(points.mean)) for points in lines.values()), low
    gaps = np.abs(ends - best)
    reach = 1.5 * float(gaps.max(initial=0.0, where=gaps <= FAR * np.median(gaps)))
    far = best - reach if curve.mode == "max" else best + reach
    near, whole = _with_room(min(top, far), max(top, far)), _with_room(low, high)
    small = whole[1] - whole[0] > SQUEEZED * (near[1] - near[0])
    return whole, near if small and reach > 0.0 else None


def _with_room(low: float, high: float) -> tuple[float, float]:
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room
