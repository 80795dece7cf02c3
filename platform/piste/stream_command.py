"""`piste stream`: what it does and prints."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from piste import running, streams, watching
from piste.errors import PisteError
from piste.ledger import Ledger, open_ledger
from piste.run_command import exit_code, to_the_end
from piste.stream_view import StreamLines, StreamView, alarm_table, summary_lines

WATCHING = "stream-watch"  # the recipe of `--watch` where none is named


def execute(options: argparse.Namespace, fields: dict[str, Any]) -> int:
    """Plans streams, or takes them up, and follows them; returns the exit code."""
    ledger, recipe = open_ledger(), options.recipe or WATCHING
    fields |= running.ONE_WORKER if options.local else {}
    if options.watch is not None:
        metric = options.metric or "train/loss"
        watched = watching.check(ledger, options.watch, metric)
        if (lack := watching.lacking(ledger, watched, metric)) is not None:
            print(f"piste: waiting for {watched}, which is still without {lack}", file=sys.stderr)
        fields |= {"source.run": watched, "source.metric": metric}
    name, config = Path(recipe).stem, running.load_recipe(recipe, fields)
    run_id = streams.plan(ledger, name, config, options.name)
    return follow(ledger, run_id, options)


def follow(ledger: Ledger, run_id: str, options: argparse.Namespace) -> int:
    """Follows planned or interrupted streams to their end and reports on them; returns the exit code."""
    try:
        result = to_the_end(ledger, run_id, options.local, observer_of(options), "stream")
    except PisteError:
        with suppress(PisteError):  # the ledger's own failure has been said
            if ledger.run(run_id).status == "failed":  # what came before it counts
                report(ledger, run_id, options.json)
        raise
    report(ledger, run_id, options.json)
    return exit_code(result)


def observer_of(options: argparse.Namespace) -> StreamLines | StreamView:
    """What shows streams while they are followed."""
    return StreamLines() if options.json else StreamView(Console(stderr=True))


def report(ledger: Ledger, run_id: str, as_json: bool) -> None:
    """What the streams of a run have come to."""
    totals, metrics = ledger.streams.totals(run_id), ledger.last_values(run_id)
    shown = {k: v for k, v in metrics.items() if not k.startswith(("log_wealth/", "alarm/", "onset/"))}
    if as_json:
        names = {stream["number"]: stream["name"] for stream in ledger.streams.standing(run_id)}
        found = [streams.alarm_columns(alarm) for alarm in ledger.streams.alarms(run_id)]
        alarms = [{"stream": names[alarm["number"]], **alarm} for alarm in found]
        status = ledger.run(run_id).status
        print(json.dumps({"stream": run_id, "status": status, **totals, "metrics": shown, "raised": alarms}))
        return
    console = Console()
    for line in summary_lines(totals, shown):
        console.print(line, highlight=False, soft_wrap=True)
    if (table := alarm_table(ledger, run_id)) is not None:
        console.print(table)
