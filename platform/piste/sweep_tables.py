"""A sweep's tables, for the terminal and as JSON: its best cells, its groups, its thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from piste.comparison import (
    Cell,
    Interval,
    against_baseline,
    baselines,
    cells,
    group_key,
    paired,
    plain,
    rank,
    tuning,
)
from piste.ledger.tables import TrialRecord
from piste.reporting import cell
from piste.space import Sweep
from piste.thresholds import Probe, Threshold

Row = dict[str, Any]


def comparison_rows(trials: Iterable[TrialRecord], section: Sweep, top: int | None = None) -> list[Row]:
    """One row a cell, best first: its seeds, its mean, and how it compares with the baseline.

    The baseline's own verdict is "baseline", or "best" where the recipe names none. A cell that was not
    tested has a difference and no verdict.

    Args:
        trials: The sweep's trials.
        section: Its `[sweep]`.
        top: Only so many cells, and the baseline; None: all.
    """
    found = cells(trials, section.mode)
    baseline = next(iter(baselines(found, section)), None)
    shown = found[:top]
    if baseline is not None and baseline.number not in {c.number for c in shown}:
        shown.append(baseline)
    return _rows(shown, found, section)


def group_rows(trials: Iterable[TrialRecord], section: Sweep) -> list[Row]:
    """One row a group, the one with the best cell first: the tuning that it got, and its best cell."""
    tuned = tuning(trials, section)
    found = sorted((c for group in tuned for c in group.cells), key=rank(section.mode))
    best = {row["cell"]: row for row in _rows([g.best for g in tuned if g.best], found, section)}
    return [
        {
            "group": group.name,
            "cells": len(group.cells),
            "trials": group.trials,
            "seconds": group.seconds,
            "best": best[group.best.number] if group.best else None,
        }
        for group in tuned
    ]


def _rows(shown: Iterable[Cell], found: Sequence[Cell], section: Sweep) -> list[Row]:
    baseline = next(iter(baselines(found, section)), None)
    compared = {c.cell.number: c for c in against_baseline(found, section)}
    rows = []
    for one in shown:
        row: Row = {"cell": one.number, "values": one.values, "n": one.n, "mean": _finite(one.mean)}
        row |= {"interval": one.interval, "failed": one.failed, "pruned": one.pruned, "seconds": one.seconds}
        row |= dict.fromkeys(("difference", "difference_interval", "p", "p_adjusted", "verdict"))
        if one is baseline:
            row["verdict"] = "baseline" if section.baseline else "best"
        elif baseline is not None:
            pair = paired(one, baseline)
            row |= {"difference": _finite(pair.difference), "difference_interval": pair.interval, "p": pair.p}
        if comparison := compared.get(one.number):
            row |= {"p_adjusted": comparison.p, "verdict": comparison.verdict}
        rows.append(row)
    return rows


def threshold_rows(found: Iterable[Threshold]) -> list[Row]:
    """One row a combination of the values that are not bisected: its probes, bracket and threshold."""
    return [
        {
            "values": one.values,
            "threshold": one.threshold,
            "bracket": [probe.value for probe in one.bracket] if one.bracket else None,
            "probes": [probe._asdict() for probe in one.probes],
        }
        for one in found
    ]


def cells_table(rows: Sequence[Row], section: Sweep) -> Table:
    """The rows of `comparison_rows`; values that all rows share are left out."""
    names = headings([key for key in section.entries if _differs(key, rows)])
    compared = any(row["difference"] is not None for row in rows)
    failed = any(row["failed"] for row in rows)
    numbers = ["n", "mean", "95 %", *(["failed"] if failed else [])]
    if compared:
        numbers += ["minus\nbaseline" if section.baseline else "minus\nbest", "95 %"]
    table = _table(names.values(), numbers)
    table.add_column("")
    for row in rows:
        shown = [_value(row["values"].get(key)) for key in names]
        shown += [str(row["n"]), cell(row["mean"]), _interval(row["interval"])]
        shown += [cell(row["failed"])] if failed else []
        shown += [cell(row["difference"]), _interval(row["difference_interval"])] if compared else []
        table.add_row(*shown, row["verdict"] or "")
    return table


def groups_table(rows: Sequence[Row], section: Sweep) -> RenderableType:
    """The rows of `group_rows`, and a line where the groups got different numbers of cells."""
    key = group_key(section)
    several = [k for k, e in section.entries.items() if e.finite is None or len(e.finite) > 1]
    names = headings([k for k in several if k != key])
    table = _table(["all" if key is None else headings([key])[key]], ["cells", "trials", "seconds", "mean"])
    table.add_column("best cell")
    table.add_column("")
    for row in rows:
        best = row["best"] or {"values": {}, "mean": None, "verdict": None}
        values = [f"{name} {_value(best['values'][k])}" for k, name in names.items() if k in best["values"]]
        shown = [str(row["cells"]), str(row["trials"]), cell(row["seconds"]), cell(best["mean"])]
        table.add_row(escape(row["group"]), *shown, "\n".join(values) or "-", best["verdict"] or "")
    note = unequal(rows)
    return table if note is None else Lines(table, Text(note))


def unequal(rows: Sequence[Row]) -> str | None:
    """What to say where the groups of `group_rows` got different numbers of cells; None where not."""
    counts = {row["group"]: row["cells"] for row in rows}
    if len(set(counts.values())) < 2:
        return None
    (first, most), *others = counts.items()
    said = ", ".join([f"{first} got {most} cells", *(f"{name} {count}" for name, count in others)])
    return f"{said}: --equal-budgets compares {min(counts.values())} each"


def thresholds_table(found: Sequence[Threshold], section: Sweep) -> Table:
    """The threshold of every combination of the values that are not bisected, with the bracket's ends."""
    names = headings([key for key in section.entries if _differs(key, [one._asdict() for one in found])])
    assert section.bisect is not None
    parameter = headings([section.bisect.parameter])[section.bisect.parameter]
    sides = ["converges", "seeds", "95 %", "does not", "seeds", "95 %"]
    table = _table(names.values(), [parameter, *sides])
    for one in found:
        edges = one.bracket or ((one.probes[-1], None) if one.probes[0].converges else (None, one.probes[0]))
        said = "no edge" if one.threshold is None else cell(one.threshold)
        shown = [_value(one.values.get(key)) for key in names]
        table.add_row(*shown, said, *(text for probe in edges for text in _probe(probe)))
    return table


def _probe(probe: Probe | None) -> tuple[str, str, str]:
    if probe is None:
        return "-", "-", "-"
    return cell(probe.value), f"{probe.converged} of {probe.n}", _interval(probe.interval)


def headings(keys: Sequence[str]) -> dict[str, str]:
    """Short names of dotted keys: `lr` for `optimizer.lr`, `optimizer` for `optimizer.name`.

    Where two would be alike they stay whole.
    """
    short = {key: key.removesuffix(".name").rpartition(".")[2] for key in keys}
    taken = list(short.values())
    return {key: name if taken.count(name) == 1 else key for key, name in short.items()}


def _table(texts: Iterable[str], numbers: Iterable[str]) -> Table:
    """A table whose first columns are never wrapped."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True, header_style="bold")
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _differs(key: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    return len({str(row["values"].get(key)) for row in rows}) > 1


def _value(value: Any) -> str:
    return escape(cell(plain(value)))


def _interval(interval: Interval | None) -> str:
    """Its ends, one above the other."""
    return "-" if interval is None else "\n".join(cell(end) for end in interval)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
