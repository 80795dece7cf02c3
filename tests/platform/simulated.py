"""Simulated processes: real code in threads of which one runs at a time, under a clock that stands still.

A task runs while it is resumed and hands back where it would wait: for another thread, for a reply, for
time. Whoever drives the world chooses who runs next, what goes wrong at the next place where something
can, and when time passes; the same choices give the same history. A process that is killed runs no further:
`Killed` unwinds it, and whatever it touches outside itself on the way refuses it.
"""

from __future__ import annotations

import io
import itertools
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

EPOCH = 1_800_000_000.0
DAMAGED = "damaged"  # a file in a checkpoint's folder that goes with it


class Killed(BaseException):
    """This process is gone."""


class Task:
    """A thread of a simulated process."""

    def __init__(self, process: Process, body: Callable[[], Any]) -> None:
        self.process = process
        self.ended = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.interrupted = False
        self._body = body
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = _TaskThread(self)

    def resume(self) -> None:
        """Lets it run to where it next waits."""
        if not self._thread.is_alive():
            self._thread.start()
        self._turn.release()
        self._back.acquire()

    def pause(self) -> None:
        """Hands back, in this task's own thread; returns when it is resumed."""
        if self.process.dead:
            raise Killed
        self._back.release()
        self._turn.acquire()
        if self.process.dead:
            raise Killed
        if self.interrupted:
            self.interrupted = False
            raise KeyboardInterrupt

    def run(self) -> None:
        self._turn.acquire()
        try:
            if self.process.dead:
                raise Killed
            self.result = self._body()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._back.release()


class _TaskThread(threading.Thread):
    def __init__(self, task: Task) -> None:
        super().__init__(target=task.run, name=f"simulated-{task.process.kind}", daemon=True)
        self.task = task


def current() -> Task | None:
    """The task whose thread this is."""
    return getattr(threading.current_thread(), "task", None)


def pause() -> None:
    """A place where others may go first."""
    if (task := current()) is not None:
        task.pause()


def alive() -> None:
    """Refuses a process that is gone."""
    if (task := current()) is not None and task.process.dead:
        raise Killed


def fault(*kinds: str) -> str | None:
    """What goes wrong at this place, if anything does; what cannot go wrong here waits for another place.

    `before` it has had an effect or `after`; or its effect comes `late`, `twice` or `partly`.
    """
    task = current()
    waiting = task.process.faults if task is not None else None
    return waiting.popleft() if waiting and waiting[0] in {*kinds, "none"} else None


class Process:
    """A process: its first task's end is its own."""

    def __init__(self, world: World, kind: str, parent: Process | None, body: Callable[[], Any]) -> None:
        self.world, self.kind, self.parent = world, kind, parent
        self.pid = next(world.pids)
        self.host: str = parent.host if parent is not None else "here"
        self.dead = False
        self.stumbles = False  # its workload is to fail
        self.terminated = threading.Event()  # by SIGTERM
        self.attempt = 0  # of a worker: which attempt it began
        self.faults: deque[str] = deque(parent.inherited if parent is not None else ())
        self.inherited: list[str] = []  # the faults of its children
        self.output = io.StringIO()
        self.closed = False  # its standard input
        self.tasks: list[Task] = []
        self.main = self.spawn(body)

    def spawn(self, body: Callable[[], Any]) -> Task:
        task = Task(self, body)
        self.tasks.append(task)
        return task

    def step(self) -> None:
        """Each of its threads runs to where it next waits."""
        for task in list(self.tasks):
            if not task.ended and not self.dead:
                task.resume()
        if self.main.ended:
            self.kill()

    def kill(self) -> None:
        """Ends it as SIGKILL does."""
        self.dead = True
        for task in self.tasks:
            while not task.ended:
                task.resume()

    @property
    def driver(self) -> Process:
        """The process that all this one's work is for."""
        return self if self.parent is None else self.parent.driver


class World:
    """Time and processes."""

    def __init__(self) -> None:
        self.now = EPOCH
        self.pids = itertools.count(1000)
        self.processes: list[Process] = []
        self.violations: list[str] = []
        self.history: list[str] = []

    def note(self, what: str) -> None:
        """A line of the history that a failing test shows."""
        task = current()
        who = f"{task.process.kind} {task.process.pid}" if task is not None else "the machine"
        self.history.append(f"{self.now - EPOCH:7.1f} {who}: {what}")

    def expect(self, condition: bool, what: str) -> None:
        """Notes what must not be, where an exception would be taken for one of the code under test."""
        if not condition:
            self.violations.append(what)
            self.note(what)

    def whole_checkpoint(self, directory: Path) -> int:
        """The step of the newest undamaged checkpoint in a run's folder; 0 where there is none."""
        found = [p for p in (directory / "checkpoints").glob("step-*") if not (p / DAMAGED).exists()]
        return max((int(p.name.removeprefix("step-")) for p in found), default=0)

    def start(self, kind: str, body: Callable[[], Any], parent: Process | None = None) -> Process:
        process = Process(self, kind, parent, body)
        self.processes.append(process)
        return process

    def living(self, *kinds: str) -> list[Process]:
        return [p for p in self.processes if not p.dead and (not kinds or p.kind in kinds)]

    def end(self) -> None:
        """Kills whatever is left."""
        for process in self.living():
            process.kill()

    def wait(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Waits in a task, other processes running meanwhile; returns whether the condition came true."""
        deadline = None if seconds is None else self.now + seconds
        while not condition():
            if deadline is not None and self.now >= deadline:
                return False
            pause()
        return True
