"""The metric buffer: between a training loop that never waits and a ledger writer that acknowledges.

`append` costs a few list operations. A thread sends what has gathered every second, or sooner when
500 rows have; it sends one message at a time and repeats it until it is acknowledged, so that nothing
is lost while the writer restarts, and nothing is doubled because the writer ignores what it has.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from piste.errors import PisteError
from piste.ledger import Message, Row

BATCH_ROWS = 500
FLUSH_SECONDS = 1.0
BEAT_SECONDS = 1.0
RETRY_SECONDS = 60.0
PAUSE_SECONDS = 0.05

Send = Callable[[Message], int]


class MetricBuffer:
    """Buffers one attempt's metrics and files for the ledger's writer.

    Args:
        send: Delivers a message and returns its acknowledgement; may raise, and is then called again.
        run_id: The run.
        attempt: The number of this attempt.
        sample: Called before every periodic flush for metrics of its own, as `(metrics, step)`.
        beat: Called by the buffer's thread about once a second.
        retry_seconds: How long a message is repeated before the buffer gives up. The rows are then
            still there, and the next call of `append` or `flush` raises.
    """

    def __init__(
        self,
        send: Send,
        run_id: str,
        attempt: int,
        sample: Callable[[], tuple[Mapping[str, float], int]] | None = None,
        beat: Callable[[], None] | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._send = send
        self._run_id = run_id
        self._attempt = attempt
        self._sample = sample
        self._beat = beat
        self._retry_seconds = retry_seconds
        self._rows: deque[Row] = deque()
        self._artifacts: deque[dict[str, Any]] = deque()
        self._sequence = count(1)
        self._error: PisteError | None = None
        self._closing = False
        self._taken = False
        self._wake = threading.Event()
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="piste-metrics", daemon=True)
        self._thread.start()

    def append(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes metrics; never blocks.

        Raises:
            PisteError: The ledger has refused earlier rows for too long (a full disk, say).
        """
        if self._error is not None:
            raise self._error
        self._taken = True
        now = time.time_ns() // 1_000_000
        for key, value in metrics.items():
            self._rows.append(Row(key, step, float(value), now))
        if len(self._rows) >= BATCH_ROWS:
            self._wake.set()

    def artifact(self, columns: dict[str, Any]) -> None:
        """Takes the record of a file, as columns of `ledger.Artifact`."""
        self._artifacts.append(columns)

    def flush(self) -> None:
        """Waits until everything taken so far is acknowledged.

        Raises:
            PisteError: The writer refuses it.
        """
        self._drain()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Flushes and ends the thread.

        Raises:
            PisteError: The writer refuses the last rows.
        """
        self._closing = True
        self._wake.set()
        self._thread.join()
        self.flush()

    def _loop(self) -> None:
        next_beat = time.monotonic()
        while not self._closing:
            if self._beat is not None and time.monotonic() >= next_beat:
                self._beat()
                next_beat = time.monotonic() + BEAT_SECONDS
            self._wake.wait(FLUSH_SECONDS)
            self._wake.clear()
            # Not before the first metric: MLflow's comparison page opens on the one that came first.
            if self._sample is not None and self._taken and not self._closing:
                metrics, step = self._sample()
                now = time.time_ns() // 1_000_000
                self._rows.extend(Row(key, step, value, now) for key, value in metrics.items())
            self._drain()

    def _drain(self) -> None:
        with self._sending:
            while (self._rows or self._artifacts) and self._error is None:
                rows = tuple(self._rows.popleft() for _ in range(min(len(self._rows), 2 * BATCH_ROWS)))
                artifacts = tuple(self._artifacts.popleft() for _ in range(len(self._artifacts)))
                message = Message(self._run_id, self._attempt, next(self._sequence), rows, artifacts)
                if not self._delivered(message):
                    self._rows.extendleft(reversed(rows))
                    self._artifacts.extendleft(reversed(artifacts))

    def _delivered(self, message: Message) -> bool:
        """Sends a message until it is acknowledged; after `retry_seconds` of refusals it gives up."""
        deadline = time.monotonic() + self._retry_seconds
        pause = PAUSE_SECONDS
        while True:
            try:
                if self._send(message) == message.sequence:
                    return True
                failure = PisteError("the ledger's writer acknowledged another message")
            except Exception as error:  # whatever the transport raises: the rows must arrive
                cause = f"{type(error).__name__}: {error}".partition("\n")[0]
                failure = (
                    error
                    if isinstance(error, PisteError)
                    else PisteError(f"the ledger's writer cannot be reached: {cause}")
                )
            if time.monotonic() >= deadline:
                self._error = failure
                return False
            threading.Event().wait(pause)
            pause = min(2 * pause, 2.0)
