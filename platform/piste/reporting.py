"""What a person sees: progress, the comparison table, the loss curves."""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from piste import catalog
from piste.config import Recipe, method_of
from piste.ledger import Ledger, number

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0  # between two lines of a log


class ProgressBar:
    """A bar with the current metrics and an ETA, fed from the ledger; in a log, a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def watch(self, ledger: Ledger, run_id: str, config: Recipe) -> Iterator[None]:
        """Shows the run while the context lasts."""
        if not self._console.is_terminal:
            with _follow(ledger, run_id, self._lines(run_id, config)):
                yield
            return
        columns = [
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}" if _total(config) else "{task.completed:.0f}"),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(run_id, total=_total(config), metrics="starting")

            def show(step: int, latest: dict[str, float]) -> None:
                progress.update(task, completed=step, metrics=_said(config, latest))

            with _follow(ledger, run_id, show):
                yield

    def _lines(self, run_id: str, config: Recipe) -> Callable[[int, dict[str, float]], None]:
        total, printed, said = _total(config), 0.0, ""

        def show(step: int, latest: dict[str, float]) -> None:
            nonlocal printed, said
            line = f"{run_id} step {step}{f'/{total}' if total else ''} {_said(config, latest)}"
            if line != said and (step == total or time.monotonic() - printed >= LINE_SECONDS):
                printed, said = time.monotonic(), line
                self._console.print(line, soft_wrap=True, highlight=False)

        return show


class JsonLines:
    """One JSON object a line: `{"run": ..., "step": ..., "metrics": {...}}`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    @contextmanager
    def watch(self, ledger: Ledger, run_id: str, config: Recipe) -> Iterator[None]:
        """Prints the run's newest metrics while the context lasts."""

        def show(step: int, latest: dict[str, float]) -> None:
            line = {"run": run_id, "step": step, "total": _total(config), "metrics": latest}
            print(json.dumps(line), file=self._stream, flush=True)

        with _follow(ledger, run_id, show):
            yield


@contextmanager
def _follow(ledger: Ledger, run_id: str, show: Any) -> Iterator[None]:
    """Calls `show(step, latest values)` from a thread whenever the ledger has new rows of the run."""
    ended = threading.Event()

    def loop() -> None:
        mark, step, latest = 0, 0, dict[str, float]()
        while True:
            last_round = ended.wait(POLL_SECONDS)
            while rows := ledger.metrics_after(run_id, mark, 1000):
                mark = rows[-1].id
                for row in rows:
                    if not row.key.startswith("system/"):
                        latest[row.key] = number(row)
                        step = max(step, row.step)
                show(step, latest)
            if last_round:
                return

    thread = threading.Thread(target=loop, name="piste-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)


def _said(config: Recipe, latest: Mapping[str, float]) -> str:
    """The headline metrics that are there, in words."""
    return " ".join(f"{key} {latest[key]:.4g}" for key in _headline(config.workload) if key in latest)


def _total(config: Recipe) -> int | None:
    total = getattr(config, "total_steps", None)
    return int(total) if total is not None else None


def _headline(workload: str) -> Sequence[str]:
    """The metrics that the workload wants compared, most important first."""
    return getattr(catalog.load_workload(workload), "headline", ("train/loss", "valid/loss"))


def summary(ledger: Ledger, run_ids: Sequence[str]) -> list[dict[str, Any]]:
    """One row a run: id, status, optimizer, lr, seed, the headline metrics.

    A measurement of the machine (`time/...`) is its median over the run, any other metric its last value.
    """
    runs = [ledger.run(run_id) for run_id in run_ids]
    keys = list(dict.fromkeys(key for run in runs for key in _headline(run.workload)))
    rows = []
    for run in runs:
        method = method_of(run.config)
        row: dict[str, Any] = {"run": run.id, "status": run.status, "optimizer": method["name"]}
        row |= {"lr": method.get("lr"), "seed": run.seed}
        last = ledger.last_values(run.id)
        for key in keys:
            values = [v for _, v in ledger.history(run.id, key)] if key.startswith("time/") else []
            row[key] = statistics.median(values) if values else last.get(key)
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `summary` for the terminal, the best loss bold; without what all share or none has."""
    usual: dict[str, set[object]] = {"status": {"finished"}, "seed": {rows[0].get("seed")}}
    keys = [key for key in rows[0] if not {row[key] for row in rows} <= usual.get(key, {None})]
    made = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True, header_style="bold")
    for key in keys:
        heading = key.replace("/", "\n").replace("_", "\n")  # narrow, so that a table fits 80 columns
        numeric = any(isinstance(row[key], float) for row in rows)
        made.add_column(heading, justify="right" if numeric else "left", vertical="bottom", no_wrap=True)
    best = {
        key: min((row[key] for row in rows if row[key] is not None), default=None)
        for key in keys
        if "loss" in key or "bits" in key
    }
    for row in rows:
        cells = []
        for key in keys:
            best_of_all = key in best and row[key] == best[key] and len(rows) > 1
            cells.append(f"[bold]{cell(row[key])}[/bold]" if best_of_all else cell(row[key]))
        made.add_row(*cells)
    return made


def cell(value: Any) -> str:
    """A value as tables show it: four digits of a number, `-` where there is none."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    for least, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.3g} {unit}"
    return f"{value:.4g}"


def loss_curves(ledger: Ledger, run_ids: Sequence[str], path: Path) -> Path:
    """Draws training and validation loss against steps and against seconds into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for index, run_id in enumerate(run_ids):
        run = ledger.run(run_id)
        train, valid = ledger.history(run_id, "train/loss"), ledger.history(run_id, "valid/loss")
        seconds = _seconds(ledger, run_id)
        label = f"{method_of(run.config)['name']}  ({run_id})"
        color = f"C{index}"
        for axis, clock in ((axes[0], None), (axes[1], seconds)):
            for points, style in (
                (train, {"alpha": 0.25, "linewidth": 1}),
                (valid, {"marker": "o", "markersize": 3}),
            ):
                x = [step if clock is None else clock.get(step) for step, _ in points]
                shown = [(a, loss) for a, (_, loss) in zip(x, points, strict=True) if a is not None]
                name = label if points is valid and clock is None else None
                axis.plot(
                    *(zip(*shown, strict=True) if shown else ([], [])), color=color, label=name, **style
                )
    axes[0].set(xlabel="step", ylabel="loss", title="validation (dots) and training (pale)")
    axes[1].set(xlabel="training seconds (validation left out)", title="the same against time")
    for axis in axes:
        axis.grid(alpha=0.2)
    axes[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _seconds(ledger: Ledger, run_id: str) -> dict[int, float]:
    """Training seconds until each step, from the step times."""
    total, clock = 0.0, {}
    for step, milliseconds in ledger.history(run_id, "time/step_ms"):
        total += milliseconds / 1000
        clock[step] = total
    return clock


def comparison_url(base: str, experiment_id: str, mlflow_run_ids: Sequence[str]) -> str:
    """MLflow's comparison page of some runs, on the server at `base`."""
    runs, experiments = quote(json.dumps(list(mlflow_run_ids))), quote(json.dumps([experiment_id]))
    return f"{base}/#/compare-runs?runs={runs}&experiments={experiments}"


def age(timestamp: float) -> str:
    """How long ago, in words."""
    seconds = max(0.0, time.time() - timestamp)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
