"""Keeps the services of one host alive: `python infra/supervisor.py SERVICES.json`.

A service that ends is started again after a pause. On SIGTERM, the notice of a host that is about to be
taken away, the services are asked to end, which a Ray node does once what runs on it has ended, and are
killed when the grace period is over. On a host of its own this is process 1; on a shared one it adopts
what its services leave behind, as process 1 would.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from infra import processes

PAUSE_SECONDS = 1.0  # before a service is started again
POLL_SECONDS = 0.1
SET_CHILD_SUBREAPER = 36  # of prctl(2)


@dataclass
class Service:
    """One program that is to run.

    Attributes:
        name: Names its log, too.
        command: Its words.
        environment: What it is told beside the supervisor's own environment.
        user: Who runs it; none: the supervisor's.
        heart: A text in the command line of one of its children: once that child has been seen, the service
            ends with it. `ray start --block` outlives a raylet that was drained or got SIGTERM.
        stop_signal: What asks it to end.
        process: The running program.
    """

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    user: str | None = None
    heart: str | None = None
    stop_signal: str = "SIGTERM"
    process: subprocess.Popen[bytes] | None = None
    _heart_pid: int | None = None
    _not_before: float = 0.0

    def start(self, logs: Path) -> None:
        """Starts the program, in a group of its own."""
        with (logs / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=os.environ | self.environment,
                user=self.user,
                group=self.user,
                extra_groups=None if self.user is None else [],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._heart_pid = None

    def heart_pid(self) -> int | None:
        """The id of the child with which the service ends, once it has been seen."""
        if self._heart_pid is None and self.heart is not None and self.process is not None:
            children = [p for p in processes.every() if processes.parent(p) == self.process.pid]
            found = (pid for pid in children if self.heart in processes.command_line(pid))
            if (seen := next(found, None)) is not None:
                say(f"{self.name} is up: process {seen}")
                self._heart_pid = seen
        return self._heart_pid

    def over(self) -> bool:
        """Whether the service has ended."""
        if self.process is None or self.process.poll() is not None:
            return True
        heart = self.heart_pid()
        return heart is not None and not processes.status(heart)

    def keep(self, logs: Path) -> None:
        """Starts the program if it does not run and the pause is over."""
        if not self.over():
            return
        if self.process is not None:
            self.kill()
            say(f"{self.name} has ended ({self.process.wait()}), and starts again in {PAUSE_SECONDS:g} s")
            self.process, self._not_before = None, time.monotonic() + PAUSE_SECONDS
        elif time.monotonic() >= self._not_before:
            self.start(logs)
            say(f"{self.name} starts")

    def ask(self) -> None:
        """Asks the program to end, and leaves the rest of its group to it."""
        if self.process is not None:
            self.process.send_signal(signal.Signals[self.stop_signal])

    def kill(self) -> None:
        """Kills the program and its group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def say(text: str) -> None:
    """A line for the supervisor's log."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def reap(services: Sequence[Service]) -> None:
    """Takes the exit codes of children that nobody else waits for."""
    own = {service.process.pid: service.process for service in services if service.process is not None}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if found.si_pid in own:
                own[found.si_pid].poll()
            else:
                os.waitpid(found.si_pid, 0)


def leave(services: Sequence[Service], grace_seconds: float) -> None:
    """Asks all services to end, waits at most for the grace period, and kills what is left."""
    deadline = time.monotonic() + grace_seconds
    for service in services:
        service.ask()
    while time.monotonic() < deadline and not all(service.over() for service in services):
        reap(services)
        time.sleep(POLL_SECONDS)
    for service in services:
        service.kill()


def main(path: Path) -> None:
    """Supervises the services that a file names until SIGTERM comes."""
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    services = [Service(**fields) for fields in told["services"]]
    notices: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: notices.append(number))
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    while not notices:
        reap(services)
        for service in services:
            service.keep(path.parent)
        time.sleep(POLL_SECONDS)
    say("asked to end")
    leave(services, told["grace_seconds"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
