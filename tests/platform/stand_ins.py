"""Stand-ins for modules of the standard library and psutil, as simulated processes see them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
from tests.platform.simulated import Process, Task, World, current, fault, pause


class SimulatedTime:
    """In place of the module `time`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.strftime = time.strftime

    def time(self) -> float:
        return self._world.now

    def monotonic(self) -> float:
        return self._world.now

    def time_ns(self) -> int:
        return int(self._world.now * 1000) * 1_000_000

    def sleep(self, seconds: float) -> None:
        self._world.wait(lambda: False, seconds)


class SimulatedOs:
    """In place of the module `os`: what differs between simulated processes; the rest is the real one."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def getpid(self) -> int:
        task = current()
        return 1 if task is None else task.process.pid

    def uname(self) -> Any:
        task = current()
        values = list(os.uname())
        return os.uname_result([values[0], "here" if task is None else task.process.host, *values[2:]])

    def nice(self, _increment: int) -> int:
        return 0

    def fsync(self, _descriptor: int) -> None:
        """The place at which a process dies with a half-written file, or finds the disk full."""
        pause()
        if fault("before") == "before":
            raise OSError(28, "No space left on device")


class SimulatedPids:
    """In place of `psutil`."""

    Error, STATUS_ZOMBIE = psutil.Error, psutil.STATUS_ZOMBIE

    def __init__(self, world: World) -> None:
        self._world = world

    def pid_exists(self, pid: int) -> bool:
        return any(p.pid == pid for p in self._world.living())

    def Process(self, _pid: int) -> SimpleNamespace:
        return SimpleNamespace(status=lambda: psutil.STATUS_RUNNING)


class SimulatedThreading:
    """In place of the module `threading`."""

    def __init__(self, world: World) -> None:
        self._world = world

    def Thread(self, target: Callable[[], Any], name: str = "", daemon: bool = True) -> _Thread:
        return _Thread(self._world, target)

    def Event(self) -> _Event:
        return _Event(self._world)

    def Lock(self) -> contextlib.AbstractContextManager[None]:
        return _Lock(self._world)


class _Thread:
    def __init__(self, world: World, target: Callable[[], Any]) -> None:
        self._world, self._target = world, target
        self._task: Task | None = None

    def start(self) -> None:
        task = current()
        assert task is not None
        self._task = task.process.spawn(self._target)

    def join(self, timeout: float | None = None) -> None:
        self._world.wait(lambda: not self.is_alive(), timeout)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.ended


class _Event:
    def __init__(self, world: World) -> None:
        self._world, self._set = world, False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        return self._world.wait(self.is_set, timeout)


class _Lock:
    def __init__(self, world: World) -> None:
        self._world, self._held = world, False

    def __enter__(self) -> None:
        self._world.wait(lambda: not self._held)
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False


class SimulatedSys:
    """In place of the module `sys`: each process has its own streams."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)

    @property
    def stdin(self) -> Any:
        return SimpleNamespace(read=self._read)

    @property
    def stderr(self) -> io.StringIO:
        task = current()
        assert task is not None
        return task.process.output

    def _read(self) -> None:
        """Standard input ends when the parent closes it or is gone."""
        task = current()
        assert task is not None
        process = task.process
        process.world.wait(lambda: process.closed or process.parent is None or process.parent.dead)


class SimulatedSubprocess:
    """In place of the module `subprocess`: a program is a function of its arguments."""

    PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

    def __init__(self, world: World, kind: str, program: Callable[[list[str]], Any]) -> None:
        self._world, self._kind, self._program = world, kind, program

    def Popen(self, command: list[str], **_: Any) -> _Popen:
        task = current()
        assert task is not None
        body = functools.partial(self._program, command)
        return _Popen(self._world, self._world.start(self._kind, body, task.process))


class _Popen:
    def __init__(self, world: World, process: Process) -> None:
        self._world, self._process = world, process
        self.stdin = self.stdout = SimpleNamespace(close=self._close)
        self.returncode: int | None = None

    def _close(self) -> None:
        self._process.closed = True

    def communicate(self, timeout: float) -> tuple[str, None]:
        self._process.closed = True
        if not self._world.wait(lambda: self._process.dead, timeout):
            raise subprocess.TimeoutExpired("a simulated process", timeout)
        return (json.dumps(self._process.main.result) if self._process.main.error is None else ""), None

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        pass
