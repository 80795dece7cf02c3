"""SIGTERM to a driver, as preemption: the first asks for a checkpoint and an end, the next ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from piste.errors import Terminated

# Why a run has ended early, with a checkpoint.
ASKED = "asked to stop"
PREEMPTED = "its host is being taken away"
LOST = "its controller does not answer"


@contextmanager
def on_terminate(grace_seconds: float) -> Iterator[threading.Event]:
    """A context in which SIGTERM sets an event, where this thread may set handlers.

    A second SIGTERM, or the end of the grace period, raises `Terminated` in the main thread, once: what that
    one has still to record is not to be cut off.

    Args:
        grace_seconds: How long after the first SIGTERM the context may still last.
    """
    stop, left = threading.Event(), threading.Event()
    over = False

    def no_longer() -> None:
        if not left.wait(grace_seconds):
            os.kill(os.getpid(), signal.SIGTERM)

    def handler(_signal: int, _frame: FrameType | None) -> None:
        nonlocal over
        if stop.is_set():
            if not over:
                over = True
                raise Terminated
            return
        stop.set()
        threading.Thread(target=no_longer, name="piste-grace", daemon=True).start()

    try:
        before = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread
        yield stop
        return
    try:
        yield stop
    finally:
        left.set()
        signal.signal(signal.SIGTERM, before)
