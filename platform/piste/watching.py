"""Watching a run in progress: one of its metrics, in the order in which the ledger got it, as a stream.

What is found is told to the run that is watched, too, as a metric `alarm/KEY/WATCH/DETECTOR` at the step that
raised it, which its relay turns into a tag in MLflow. Several watches of a run so tell it of each of theirs.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from piste import relay_process
from piste.errors import BadInput, PisteError, nearest
from piste.ledger import Ledger, Message, Row, StoredRow, number
from piste.shards import Shard, StreamRecipe
from piste.tracking import ALARM, TERMINAL, tracking_uri
from piste.workload import Run

POLL_SECONDS = 0.5
PAGE = 10_000  # values that are read again at once


def check(ledger: Ledger, run_id: str, key: str) -> str:
    """The full id of a run that can be watched; one in progress may have the metric later.

    Raises:
        BadInput: There is no such run; or it has ended without that metric.
    """
    row = ledger.run(run_id)
    lack = lacking(ledger, row.id, key)
    if row.status in TERMINAL and lack is not None:
        raise BadInput(f"{row.id} has ended without {lack}")
    return row.id


def lacking(ledger: Ledger, run_id: str, key: str) -> str | None:
    """That a run has no such metric, in words, with the nearest that it has; None where it has it."""
    known = ledger.keys(run_id)
    return None if key in known else f"a metric {key!r}{nearest(key, known)}"


def follow(
    ledger: Ledger, run_id: str, module: Any, config: StreamRecipe, attempt: int, stop: threading.Event
) -> bool:
    """Follows a metric until its run has ended; where the recipe says `until_alarm`, to the first alarm.

    Args:
        ledger: The ledger.
        run_id: The run that watches.
        module: Its workload.
        config: Its recipe.
        attempt: The number of its attempt.
        stop: Set when it is to end early.

    Returns:
        Whether it has ended early because it was to.

    Raises:
        PisteError: The run has ended without that metric, was interrupted, or has lost its driver; or an
            event is refused. What came before is kept, and told.
    """
    assert config.watched is not None
    watched, key = config.watched
    shard = Shard(module, config, [0], ledger.streams, run_id, attempt)
    progress = shard.open()
    mark = seen = 0  # the last row of the metric that was read, and how many
    alarmed = False
    while not progress.ended and not stop.is_set():
        lost = ledger.lost_driver(watched)  # before its status: a driver records the end, then it goes
        run = ledger.run(watched)  # before its rows: what then lacks is really absent
        taken = progress.position - seen  # by an earlier attempt, which may not have told of them
        rows = ledger.metrics_after(watched, mark, min(taken, PAGE) or config.stream.batch, key)
        if config.until_alarm and alarmed and not taken:
            progress = shard.take(seen, 1, {0: []})
        elif rows:
            if not taken:
                try:
                    progress = shard.take(seen, len(rows), {0: [number(row) for row in rows]})
                except PisteError:
                    _tell(ledger, run_id, config.watched, seen, rows)  # of what came before the failure
                    raise
            alarmed |= _tell(ledger, run_id, config.watched, seen, rows)
            mark, seen = rows[-1].id, seen + len(rows)
        elif run.status == "interrupted" or (lost is not None and run.status not in TERMINAL):
            resume = f"resume {watched}" if run.sweep_id is None else f"sweep --resume {run.sweep_id}"
            why = "was interrupted" if lost is None else f"has lost its driver ({lost})"
            raise PisteError(
                f"{watched} {why}: `piste {resume}` continues it, and then `piste resume {run_id}` this watch"
            )
        elif run.status in TERMINAL:
            if seen == 0 and (lack := lacking(ledger, watched, key)) is not None:
                raise PisteError(f"{watched} has ended without {lack}")
            progress = shard.take(seen, 1, {0: []})
        else:
            stop.wait(POLL_SECONDS)
    return not progress.ended


def _tell(
    ledger: Ledger, run_id: str, watched: tuple[str, str], first: int, values: Sequence[StoredRow]
) -> bool:
    """Tells a run of the alarms on some values of its metric; what is there already is ignored by the ledger.

    Args:
        ledger: The ledger.
        run_id: The run that watches.
        watched: The run and the metric.
        first: The number of the first value.
        values: The values.

    Returns:
        Whether there was any alarm.
    """
    alarms = ledger.streams.alarms(run_id, among=range(first, first + len(values)))
    now, (told, metric) = time.time_ns() // 1_000_000, watched
    rows = [
        Row(f"{ALARM}{metric}/{run_id}/{a.detector}", values[a.sequence - first].step, a.log_wealth, now)
        for a in alarms
    ]
    if rows:  # of none of that run's attempts, so that no new one fences them off
        ledger.apply(Message(told, sys.maxsize, 0, tuple(rows)))
    return bool(rows)


def show(ledger: Ledger, watched: str, view: Run) -> None:
    """Shows in MLflow what a run was told of after its end, when its own relay had none to wait for.

    A run of a sweep is shown with the sweep, whose relay takes no more of it once it has ended.

    Args:
        ledger: The ledger.
        watched: The run that was watched.
        view: The run that has watched it.
    """
    row = ledger.run(watched)
    if row.status not in TERMINAL or not ledger.streams.alarms(view.id, limit=1):
        return
    if row.sweep_id is not None:
        view.note(f"MLflow may lack alarms of {watched}, which has ended in its sweep: the ledger has them")
        return
    uri = tracking_uri(row.config["tracking"]["uri"])
    relay = relay_process.RelayProcess(ledger.url, watched, uri, Path(view.directory) / "relay.log")
    if relay.finish().get("pending") != 0:
        view.note(f"MLflow may lack alarms of {watched}: `piste sync {watched}` pushes them")
