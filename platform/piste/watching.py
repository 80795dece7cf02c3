"""Watching a run in progress: one of its metrics, in the order in which the ledger got it, as a stream.

What is found is told to the run that is watched, too, as a metric `alarm/KEY` at the step that raised it,
which its relay turns into a tag in MLflow.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from piste.errors import BadInput, nearest
from piste.ledger import Ledger, Message, Row
from piste.shards import Shard, StreamRecipe
from piste.tracking import ALARM, TERMINAL

POLL_SECONDS = 0.5


def check(ledger: Ledger, run_id: str, key: str) -> str:
    """The full id of a run that can be watched.

    Raises:
        BadInput: There is no such run; or it has metrics, or has ended, and none of them is this one.
    """
    row = ledger.run(run_id)
    known = ledger.keys(row.id)
    if key not in known and (known or row.status in TERMINAL):
        raise BadInput(f"{row.id} has no metric {key!r}{nearest(key, known)}")
    return row.id


def follow(
    ledger: Ledger, run_id: str, module: Any, config: StreamRecipe, attempt: int, stop: threading.Event
) -> bool:
    """Follows a metric until its run has ended.

    Args:
        ledger: The ledger.
        run_id: The run that watches.
        module: Its workload.
        config: Its recipe.
        attempt: The number of its attempt.
        stop: Set when it is to end early.

    Returns:
        Whether it has ended early because it was to.
    """
    assert config.watched is not None
    watched, key = config.watched
    shard = Shard(module, config, [0], ledger.streams, run_id, attempt)
    progress = shard.open()
    told = _Told(ledger, run_id, watched, key)
    told.tell()  # what an earlier attempt may have had no time for
    while not progress.ended and not stop.is_set():
        over = ledger.run(watched).status in TERMINAL  # before its rows: what then lacks is really absent
        first = progress.position
        values = [value for _, value in ledger.events(watched, key, first, config.stream.batch)]
        if values:
            progress = shard.take(first, len(values), {0: values})
            told.tell()
        elif over:
            progress = shard.take(first, 1, {0: []})
        else:
            stop.wait(POLL_SECONDS)
    return not progress.ended


class _Told:
    """Tells a run of the alarms on its metric, each once."""

    def __init__(self, ledger: Ledger, run_id: str, watched: str, key: str) -> None:
        self._ledger, self._run_id = ledger, run_id
        self._watched, self._key = watched, key
        self._told: set[tuple[str, int]] = set()

    def tell(self) -> None:
        """Tells of what is new; a row that is there already is ignored by the ledger."""
        if self._ledger.streams.totals(self._run_id)["alarms"] == len(self._told):
            return
        now, rows = time.time_ns() // 1_000_000, []
        alarms = self._ledger.streams.alarms(self._run_id)
        new = [alarm for alarm in alarms if (alarm.detector, alarm.sequence) not in self._told]
        for alarm in new:
            [(step, _)] = self._ledger.events(self._watched, self._key, alarm.sequence, 1)
            rows.append(Row(f"{ALARM}{self._key}/{alarm.detector}", step, alarm.log_wealth, now))
        # It is of none of that run's attempts, so that no new one fences it off.
        self._ledger.apply(Message(self._watched, sys.maxsize, 0, tuple(rows)))
        self._told |= {(alarm.detector, alarm.sequence) for alarm in new}
