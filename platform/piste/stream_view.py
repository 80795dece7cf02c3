"""Streams on the terminal: each one's wealth as a sparkline, the newest alarms, and how fast events pass."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from piste.config import Recipe
from piste.ledger import Ledger, number
from piste.ledger.tables import StreamAlarm
from piste.reporting import LINE_SECONDS, POLL_SECONDS, cell

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # values of a sparkline
LEAST = 8  # where a terminal is narrow
VALUE = 22  # columns of `log-wealth -1.23e+05` and of what is between it, the bars and the name
ALARMS = 5  # the newest, while streams run
LISTED = 20  # in the report
SPEED_SECONDS = 5.0


def sparkline(values: Sequence[float], top: float) -> str:
    """The newest values as bars, from 0 to `top`; what is below 0 or not finite is the lowest bar."""
    bars = []
    for value in list(values)[-WIDTH:]:
        share = min(max(value / top, 0.0), 1.0) if math.isfinite(value) else 0.0
        bars.append(BARS[min(int(share * len(BARS)), len(BARS) - 1)])
    return "".join(bars)


class Standing:
    """What is shown of a run's streams, read from the ledger again and again.

    Attributes:
        wealth: The newest log-wealths of the streams that are shown, by `stream/detector`.
        totals: Events, alarms and so on of all streams.
        speed: Events a second, over the last seconds.
        alarms: The newest alarms.
        names: The streams' names by number.
    """

    def __init__(self, ledger: Ledger, run_id: str) -> None:
        self._ledger, self._run_id = ledger, run_id
        self._mark = 0
        self._past = deque([(time.monotonic(), ledger.streams.totals(run_id)["events"])])
        self.wealth: dict[str, deque[float]] = {}
        self.totals: dict[str, int] = {}
        self.speed = 0.0
        self.alarms: list[StreamAlarm] = []
        self.names: dict[int, str] = {}

    def read(self) -> None:
        """Reads what is new."""
        while rows := self._ledger.metrics_after(self._run_id, self._mark, 1000):
            self._mark = rows[-1].id
            for row in rows:
                kind, _, place = row.key.partition("/")
                if kind == "log_wealth":
                    self.wealth.setdefault(place, deque(maxlen=WIDTH)).append(number(row))
        self.totals = self._ledger.streams.totals(self._run_id)
        if len(self.names) < self.totals["streams"]:
            self.names = {s["number"]: s["name"] for s in self._ledger.streams.standing(self._run_id)}
        self.alarms = self._ledger.streams.alarms(self._run_id, limit=ALARMS)
        now = time.monotonic()
        self._past.append((now, self.totals["events"]))
        while now - self._past[0][0] > SPEED_SECONDS and len(self._past) > 2:
            self._past.popleft()
        (then, before), (_, events) = self._past[0], self._past[-1]
        self.speed = (events - before) / (now - then) if now > then else 0.0


class StreamView:
    """Sparklines, alarms and throughput that stay in place; in a log, a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def watch(self, ledger: Ledger, run_id: str, config: Recipe) -> Iterator[None]:
        """Shows the streams while the context lasts."""
        if not self._console.is_terminal:
            printed = 0.0

            def line(standing: Standing) -> None:
                nonlocal printed
                if time.monotonic() - printed >= LINE_SECONDS:
                    printed = time.monotonic()
                    text = f"{run_id} {_said(standing)}"
                    self._console.print(text, soft_wrap=True, highlight=False)

            with _polled(ledger, run_id, line):
                yield
            return
        with Live(console=self._console, transient=True, auto_refresh=False) as live:

            def show(standing: Standing) -> None:
                live.update(_panel(standing, run_id, self._console.width), refresh=True)

            with _polled(ledger, run_id, show):
                yield


class StreamLines:
    """One JSON object a line: `{"stream": ..., "events": ..., "alarms": ..., "events_per_s": ..., ...}`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    @contextmanager
    def watch(self, ledger: Ledger, run_id: str, config: Recipe) -> Iterator[None]:
        """Prints where the streams stand while the context lasts."""
        last = -1

        def line(standing: Standing) -> None:
            nonlocal last
            if standing.totals["events"] != last:
                last = standing.totals["events"]
                wealth = {place: values[-1] for place, values in standing.wealth.items()}
                facts = {**standing.totals, "events_per_s": round(standing.speed), "log_wealth": wealth}
                print(json.dumps({"stream": run_id, **facts}), file=self._stream, flush=True)

        with _polled(ledger, run_id, line):
            yield


@contextmanager
def _polled(ledger: Ledger, run_id: str, show: Callable[[Standing], None]) -> Iterator[None]:
    """Calls `show` from a thread now and then, and once at the end."""
    ended = threading.Event()
    standing = Standing(ledger, run_id)

    def loop() -> None:
        last = False
        while not last:
            last = ended.wait(POLL_SECONDS)
            standing.read()
            if standing.totals["streams"] > 0:
                show(standing)

    thread = threading.Thread(target=loop, name="piste-streams", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)


def _said(standing: Standing) -> str:
    totals = standing.totals
    return (
        f"{totals['events']:,} events, {standing.speed:,.0f} a second; {totals['alarms']:,} alarms; "
        f"{totals['ended']} of {totals['streams']} streams ended"
    )


def _panel(standing: Standing, run_id: str, width: int) -> Group:
    lines = Table.grid(padding=(0, 1))
    lines.add_column(overflow="ellipsis")
    lines.add_column(no_wrap=True)
    lines.add_column(no_wrap=True)
    bars = max(width - VALUE - max(map(len, standing.wealth), default=0), LEAST)
    for place, values in standing.wealth.items():
        top = max(max((v for v in values if math.isfinite(v)), default=0.0), 1.0)
        lines.add_row(
            place, Text(sparkline(values, top)[-bars:], style="cyan"), f"log-wealth {values[-1]:.3g}"
        )
    alarms = [Text(_alarm_line(alarm, standing.names), style="bold red") for alarm in standing.alarms]
    # A terminal that is too low shows the first lines.
    return Group(Text(run_id, style="bold"), Text(_said(standing)), *alarms, lines)


def _alarm_line(alarm: StreamAlarm, names: Mapping[int, str]) -> str:
    name = names.get(alarm.number, str(alarm.number))
    return (
        f"alarm {name}/{alarm.detector} at {alarm.sequence:,}: onset about {alarm.onset:,}, "
        f"log-wealth {alarm.log_wealth:.3g} >= {alarm.log_threshold:.3g}"
    )


def summary_lines(totals: Mapping[str, int], metrics: Mapping[str, float]) -> list[str]:
    """A run's totals and metrics as lines."""
    head = f"{totals['streams']} streams, {totals['events']:,} events, {totals['alarms']:,} alarms"
    skipped = f", {totals['skipped']:,} events skipped that were not finite" if totals["skipped"] else ""
    rows = {k: v for k, v in metrics.items() if not k.startswith(("stream/", "system/"))}
    return [head + skipped, *(f"{key:<28} {cell(value)}" for key, value in rows.items())]


def alarm_table(ledger: Ledger, run_id: str) -> Table | None:
    """The first alarm of each detector on a stream, some of them; None where there is no alarm."""
    names = {stream["number"]: stream["name"] for stream in ledger.streams.standing(run_id)}
    first: dict[tuple[int, str], StreamAlarm] = {}
    for alarm in ledger.streams.alarms(run_id):
        first.setdefault((alarm.number, alarm.detector), alarm)
    if not first:
        return None
    more = len(first) - LISTED
    title = f"first alarms, and {more:,} more" if more > 0 else "first alarms"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for heading in ("stream", "detector", "alarm", "onset", "log-wealth", "threshold"):
        table.add_column(heading, justify="left" if heading in {"stream", "detector"} else "right")
    for alarm in list(first.values())[:LISTED]:
        table.add_row(*_cells(alarm, names))
    return table


def _cells(alarm: StreamAlarm, names: Mapping[int, str]) -> list[str]:
    numbers: list[Any] = [alarm.log_wealth, alarm.log_threshold]
    return [
        names[alarm.number],
        alarm.detector,
        f"{alarm.sequence:,}",
        f"{alarm.onset:,}",
        *(f"{value:.2f}" for value in numbers),
    ]
