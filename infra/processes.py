"""What /proc tells of processes, and how they are ended for certain."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path


def every() -> list[int]:
    """The ids of all processes that this one can see."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def status(pid: int) -> dict[str, str]:
    """The fields of `/proc/PID/status`; empty where there is none, or nothing is left but an exit code."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    fields = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {} if fields["State"].startswith(("Z", "X")) else fields


def parent(pid: int) -> int | None:
    """Who has started a process, or has adopted it since."""
    fields = status(pid)
    return int(fields["PPid"]) if fields else None


def command_line(pid: int) -> str:
    """A process's words, separated by spaces; empty where it cannot be read."""
    return _words(pid, "cmdline")


def setting(pid: int, key: str) -> str | None:
    """A value of the environment with which a process was started."""
    for word in _words(pid, "environ").split(" "):
        if word.startswith(f"{key}="):
            return word.partition("=")[2]
    return None


def _words(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def with_descendants(pids: Iterable[int]) -> set[int]:
    """These processes and all that descend from them."""
    children: dict[int, list[int]] = {}
    for pid in every():
        if (above := parent(pid)) is not None:
            children.setdefault(above, []).append(pid)
    found: set[int] = set()
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    return found


def memory_mib(pids: Iterable[int]) -> float:
    """The proportional set size of processes: what they share is divided among those who share it."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total / 1024


def send(pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Sends a signal to those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end_all(find: Callable[[], Iterable[int]], seconds: float = 10.0) -> None:
    """Kills what `find` returns until it returns nothing.

    Raises:
        TimeoutError: Something cannot be killed.
    """
    deadline = time.monotonic() + seconds
    while pids := list(find()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still running after SIGKILL: {', '.join(map(str, pids))}")
        send(pids)
        time.sleep(0.02)
