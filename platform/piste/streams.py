"""Runs that are streams: planned under an id of one's own, followed to their end, and summed up."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from piste import catalog, running
from piste.config import Recipe
from piste.errors import BadInput
from piste.ledger import Ledger
from piste.ledger import Run as RunRow
from piste.ledger.tables import STREAM, StreamAlarm
from piste.preflight import check_resources
from piste.shards import Feed, Shard, StreamRecipe, read
from piste.tracking import flatten
from piste.workload import Run

_ID = re.compile(r"\w[\w.-]*", re.ASCII)
LISTED_ALARMS = 10_000
# Where a stream is shown and computed may change; all else decides what it says.
_FREE = ("tracking.", "resources.", "sweep.")


def plan(ledger: Ledger, name: str, config: Recipe, stream_id: str | None = None) -> str:
    """Records a run of streams as planned, or finds the one of that id; returns its id.

    Raises:
        BadInput: The workload has no streams, or the id is that of streams that differ: the message says how.
    """
    check(name, config)
    if stream_id is not None and not _ID.fullmatch(stream_id):
        raise BadInput(f"--name {stream_id!r}: use letters, digits, dots, dashes and underscores")
    if stream_id is None or not ledger.has(stream_id):
        return running.plan(ledger, name, config, run_id=stream_id, kind=STREAM)
    row = ledger.run(stream_id)
    changes = changed(row, config)
    if changes:
        shown = ", ".join(changes[:4]) + (f" and {len(changes) - 4} more" if len(changes) > 4 else "")
        raise BadInput(f"{row.id} is there, but not as these streams: {shown}: give them another --name")
    return running.resumable(ledger, row.id, local=False)


def check(recipe: str, config: Recipe) -> None:
    """Refuses a recipe without streams.

    Raises:
        BadInput: It has none.
    """
    if not isinstance(config, StreamRecipe):
        raise BadInput(f"workload {config.workload!r} has no streams: `piste run {recipe}` runs it")


def changed(row: RunRow, config: Recipe) -> list[str]:
    """What makes a recipe, or its data, another than that of a run: `section.field before -> now`.

    The code may differ: a detector refuses a state that is not its own.
    """
    _, data = running.origin(config)
    try:  # fields that came since have their defaults
        known = running.resolve(row.config, row.id).model_dump(mode="json")
    except BadInput:
        known = row.config
    before, now = flatten(known), flatten(config.model_dump(mode="json"))
    before, now = ({k: v for k, v in each.items() if not k.startswith(_FREE)} for each in (before, now))
    found = [
        f"{key} {before.get(key, 'unset')!r} -> {now.get(key, 'unset')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if not row.is_stream:
        found.insert(0, "it is no stream")
    if row.provenance.get("data_hash", data) != data:
        found.append("its data have changed")
    return found


def execute(ledger: Ledger, run_id: str, config: StreamRecipe, stop: threading.Event, local: bool) -> bool:
    """Follows the streams of a run to their end, from where the ledger has them.

    Args:
        ledger: The ledger.
        run_id: The run.
        config: Its recipe.
        stop: Set when it is to end early.
        local: In this process, one shard, without Ray; so is a metric of the ledger always followed.

    Returns:
        Whether it has ended early because it was to.

    Raises:
        PisteError: A source or a detector failed; all that came before is in the ledger.
    """
    before, begun = ledger.streams.totals(run_id)["events"], time.monotonic()
    if local or config.watched is not None:
        attempt = ledger.begin_attempt(run_id)
        stopped = _follow_here(ledger, run_id, config, attempt, stop)
    else:
        check_resources(config.resources)
        from piste import training  # noqa: F401  (it sets what Ray reads when it is imported)

        # isort: split
        from piste import streaming

        attempt, stopped = streaming.follow(ledger, run_id, config, stop)
    seconds = time.monotonic() - begun
    totals = ledger.streams.totals(run_id)
    view = Run(run_id, config, Path(ledger.run(run_id).directory), ledger.apply, attempt)
    try:
        view.log({"time/events_per_s": (totals["events"] - before) / seconds, "time/s": seconds}, attempt)
        if not stopped:
            _sum_up(ledger, run_id, config, totals, view)
        if not stopped and config.watched is not None:
            from piste import watching

            watching.show(ledger, config.watched[0], view)
    finally:
        view.close()
    return stopped


def _follow_here(
    ledger: Ledger, run_id: str, config: StreamRecipe, attempt: int, stop: threading.Event
) -> bool:
    module = catalog.load_workload(config.workload)
    if config.watched is not None:
        from piste import watching

        return watching.follow(ledger, run_id, module, config, attempt, stop)
    numbers = range(len(module.stream_names(config)))
    shard = Shard(module, config, numbers, ledger.streams, run_id, attempt)
    source = module.open_source(config, numbers)
    feed = Feed(shard.open(), config.stream.batch, window=1)
    while not feed.ended and not stop.is_set():
        first, count = next(feed.due())
        feed.answered(first, shard.take(first, count, read(source, first, count)))
    return not feed.ended


def _sum_up(ledger: Ledger, run_id: str, config: StreamRecipe, totals: Mapping[str, int], view: Run) -> None:
    """What came of all streams, as metrics and tables of the run."""
    module = catalog.load_workload(config.workload)
    standing = ledger.streams.standing(run_id, states=True)
    alarms = [alarm_columns(alarm) for alarm in ledger.streams.alarms(run_id)]
    last = max((stream["sequence"] for stream in standing), default=0)
    metrics = {f"stream/{name}": float(totals[name]) for name in ("streams", "events", "skipped", "alarms")}
    metrics["stream/alarmed"] = float(len({alarm["number"] for alarm in alarms}))
    if hasattr(module, "summarize"):
        metrics |= module.summarize(config, standing, alarms)
    view.log(metrics, last)
    if hasattr(module, "figures"):
        for name, figure in module.figures(config, standing, alarms).items():
            view.figure(name, figure, last)
    names = {stream["number"]: stream["name"] for stream in standing}
    first = {(alarm["number"], alarm["detector"]): alarm for alarm in reversed(alarms)}
    if first:
        listed = [{"stream": names[number], **first[number, name]} for number, name in sorted(first)]
        view.table("alarms", listed[:LISTED_ALARMS], last)
    for stream in standing:
        said = f"stream {stream['name']} ended after {stream['sequence']} events"
        if not stream["wealth"]:
            view.note(f"{said}, too few to calibrate its detectors: nothing was looked for in it")
        elif not config.watched and stream["sequence"] < config.events:
            view.note(said)


def alarm_columns(alarm: StreamAlarm) -> dict[str, Any]:
    """An alarm for a table, for a machine or a workload to read."""
    names = ("number", "detector", "sequence", "onset", "log_wealth", "log_threshold", "details")
    return {name: getattr(alarm, name) for name in names}
