"""What a person sees of a sweep: live progress, its tables, all its pictures."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from piste import learning_curves, sweep_tables
from piste import sweep_pictures as pictures
from piste.comparison import equal_budgets
from piste.dry_run import DryRun
from piste.ledger import Ledger, TrialRecord
from piste.reporting import LINE_SECONDS, cell
from piste.schedule import Counts, Schedule
from piste.space import Sweep
from piste.sweeping import Tell
from piste.thresholds import Threshold, thresholds
from piste.trials import Planned, Trial, Work, converged

Budgets = Literal["all", "cells", "seconds"]
TOP = 20
LISTED = 50


class SweepProgress:
    """A live view of the trials, with an ETA and the best so far; in a log, lines now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def sweep(self, schedule: Schedule) -> Iterator[Tell]:
        """Shows the sweep while the context lasts."""

        def show() -> RenderableType:
            return _live(schedule.sweep_id, schedule.section, schedule.counts)

        if not self._console.is_terminal:
            yield self._lines(schedule, show)
            return
        live = Live(get_renderable=show, console=self._console, transient=True, refresh_per_second=4)
        with live:
            yield lambda event, work: None

    def _lines(self, schedule: Schedule, show: Callable[[], RenderableType]) -> Tell:
        lock, printed = threading.Lock(), 0.0

        def tell(_event: Literal["started", "ended"], _work: Work) -> None:
            nonlocal printed
            with lock:
                last = schedule.counts.ended == schedule.counts.total
                if last or time.monotonic() - printed >= LINE_SECONDS:
                    printed = time.monotonic()
                    self._console.print(show())

        return tell


class SweepJsonLines:
    """One JSON object a line whenever work starts or ends: the trials, and where the sweep stands."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._lock = threading.Lock()

    @contextmanager
    def sweep(self, schedule: Schedule) -> Iterator[Tell]:
        """Prints while the context lasts."""

        def tell(event: Literal["started", "ended"], work: Work) -> None:
            counts = schedule.counts
            line: dict[str, Any] = {"sweep": schedule.sweep_id, "event": event}
            if work.packed:
                line["trials"] = len(work.trials)
            else:
                line |= _trial_line(work.trials[0])
            for name in ("running", "finished", "pruned", "failed", "reused", "total"):
                line[name] = getattr(counts, name)
            line |= {"eta": counts.eta, "best": None if counts.best is None else counts.best.value}
            with self._lock:
                print(json.dumps(line), file=self._stream, flush=True)

        yield tell


def _trial_line(trial: Trial) -> dict[str, Any]:
    line = {"trial": trial.number, "run": trial.run_id, "values": trial.values, "seed": trial.seed}
    # JSON has no NaN.
    value = trial.value if trial.value is not None and math.isfinite(trial.value) else None
    return line | {"outcome": trial.outcome, "objective": value}


def _live(name: str, section: Sweep, counts: Counts) -> RenderableType:
    """How far it is, what came of the trials, and the best so far."""
    line = Table.grid(padding=(0, 1))
    whole = Text(name, style="bold")
    ended = f"{counts.ended}/{counts.total}" if counts.total else str(counts.ended)
    said = [f"{counts.running} running", f"{counts.finished} finished"]
    said += [f"{getattr(counts, n)} {n}" for n in ("pruned", "failed", "reused") if getattr(counts, n)]
    eta = "" if counts.eta is None else f"ETA {duration(counts.eta)}"
    bar = Bar(total=counts.total or None, completed=counts.ended, width=20, pulse=counts.total is None)
    line.add_row(whole, bar, ended, duration(counts.seconds), eta)
    best = "no trial has finished yet"
    if counts.best is not None:
        names = sweep_tables.headings(list(counts.best.values))
        values = ", ".join(f"{names[k]} {cell(v)}" for k, v in counts.best.values.items())
        best = f"best {section.metric} {cell(counts.best.value)}" + (f" at {values}" if values else "")
    return Group(line, Text(f"  {', '.join(said)}"), Text(f"  {best}"))


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as a clock."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def edges(ledger: Ledger, trials: Sequence[TrialRecord], section: Sweep) -> list[Threshold]:
    """The thresholds that a bisection has found; none for another searcher."""
    if section.searcher != "bisect":
        return []
    return thresholds(trials, section, lambda trial: converged(ledger, section, trial))


def tables(
    ledger: Ledger,
    trials: Sequence[TrialRecord],
    section: Sweep,
    budgets: Budgets = "all",
) -> tuple[dict[str, Any], list[RenderableType]]:
    """A sweep's tables, as JSON and for the terminal.

    Args:
        ledger: The ledger that has it.
        trials: Its trials.
        section: Its `[sweep]`.
        budgets: `cells` or `seconds`: every group with as much tuning as the one that got least.
    """
    compared = trials if budgets == "all" else equal_budgets(trials, section, budgets)
    cell_rows = sweep_tables.comparison_rows(compared, section, TOP)
    group_rows = sweep_tables.group_rows(compared, section)
    found: dict[str, Any] = {"cells": cell_rows, "groups": group_rows}
    shown: list[RenderableType] = []
    if section.searcher == "bisect":
        bracketed = edges(ledger, trials, section)
        found["thresholds"] = sweep_tables.threshold_rows(bracketed)
        shown.append(sweep_tables.thresholds_table(bracketed, section))
    elif cell_rows:
        shown.append(sweep_tables.cells_table(cell_rows, section))
        if len(group_rows) > 1:
            shown += [Text(""), sweep_tables.groups_table(group_rows, section)]
    return found, shown


def draw_all(ledger: Ledger, trials: Sequence[TrialRecord], section: Sweep, folder: Path) -> list[Path]:
    """Draws every picture that these trials allow into a folder, as PNG files."""
    made = [
        draw(trials, section, folder / f"{draw.__name__.replace('_', '-')}.png")
        for draw in (
            pictures.parallel_coordinates,
            pictures.parameters,
            pictures.importances,
            pictures.best_so_far,
            pictures.time_to_target,
        )
    ]
    made.append(learning_curves.of_sweep(ledger, trials, section, folder / "learning-curves.png"))
    edge = folder / "thresholds.png"
    made.append(pictures.thresholds(trials, section, edge, lambda t: converged(ledger, section, t)))
    return [path for path in made if path is not None]


def print_dry_run(plan: DryRun, as_json: bool) -> None:
    """Prints what a sweep would compute."""
    rows: list[tuple[str, Planned, str | None]] = [("compute", item, None) for item in plan.compute]
    rows += [("reuse", *pair) for pair in plan.reused] + [("fail", item, None) for item in plan.unfit]
    rows.sort(key=lambda row: row[1].trial.number)
    if as_json:
        trials = [
            {"do": do, "trial": item.trial.number, "values": item.trial.values, "seed": item.trial.seed}
            | {"reuses": run, "error": item.run["error"]}
            for do, item, run in rows
        ]
        cost = {"seconds_each": plan.seconds, "seconds": plan.total, "basis": plan.basis}
        print(json.dumps({"trials": trials, "later": plan.later, **cost, "at_a_time": plan.at_a_time}))
        return
    console, table = Console(), Table(box=None, pad_edge=False, header_style="bold")
    names = sweep_tables.headings(
        list(dict.fromkeys(key for _, item, _ in rows for key in item.trial.values))
    )
    for name in ("trial", *names.values(), "seed", ""):
        table.add_column(name, no_wrap=True)
    for _, item, run in rows[:LISTED]:
        values = [escape(cell(item.trial.values.get(key))) for key in names]
        said = f"reuses {run}" if run else item.run["error"] or ""
        table.add_row(str(item.trial.number), *values, str(item.trial.seed), escape(said))
    console.print(table)
    if len(rows) > LISTED:
        console.print(f"... and {len(rows) - LISTED} more")
    later = {None: " and those that its results ask for", 0: ""}.get(
        plan.later, f" and {plan.later} that depend on their results"
    )
    fail = f", {len(plan.unfit)} fail" if plan.unfit else ""
    console.print(f"{len(plan.compute)} trials to compute{later}, {len(plan.reused)} reused{fail}")
    if not plan.compute and not plan.later:
        return
    if plan.seconds is None or plan.total is None:
        console.print(f"no estimate: {plan.basis}")
        return
    wall = duration(plan.total / plan.at_a_time)
    console.print(f"about {wall} with {plan.at_a_time} at a time: {plan.seconds:.3g} s each ({plan.basis})")
