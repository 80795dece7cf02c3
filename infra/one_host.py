"""Hosts in name only: plain processes of this machine, for where namespaces are not to be had.

Every process of such a host, and whatever it starts, has the host's name in its environment: this is how
it is found again. There is no network to cut.
"""

from __future__ import annotations

import os
import signal
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra import processes
from infra.errors import BadCommand
from infra.hosts import detach
from infra.nodes import PLACE

SHUTDOWN_SECONDS = 5.0


class OneHost:
    """The hosts of one cluster, all of them this machine.

    Args:
        cluster: The cluster's name.
        folder: Where it keeps its files.
    """

    def __init__(self, cluster: str, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder

    def make(self, names: Sequence[str]) -> dict[str, str]:
        """Addresses on loopback, one each."""
        for name in names:
            (self._folder / name).mkdir(exist_ok=True)
        number = zlib.crc32(self._cluster.encode()) % (254 * 254)
        network = f"127.{1 + number // 254}.{1 + number % 254}"
        return {name: f"{network}.{11 + i}" for i, name in enumerate(names)}

    def boot(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts a host's first process."""
        detach(command, environment, self._folder, self._folder / name / "boot.log")

    def first_process(self, name: str) -> int | None:
        """The host's supervisor; None while it is switched off."""
        return next((pid for pid in self._marked(name) if _is_supervisor(pid)), None)

    def processes(self, name: str) -> list[int]:
        """All processes of a host."""
        found = processes.with_descendants(self._marked(name))
        return sorted(found - {os.getpid()})

    def enter(self, name: str, command: Sequence[str]) -> list[str]:
        """The words that run a command: here it is not run anywhere else."""
        return list(command)

    def cut(self, name: str) -> None:
        """Refused."""
        raise BadCommand(f"{name} has no network of its own to cut: the cluster runs as plain processes")

    def heal(self, name: str) -> None:
        """Refused."""
        self.cut(name)

    def is_cut(self, name: str) -> bool:
        """Never."""
        return False

    def down(self) -> None:
        """Ends all processes of the cluster; PostgreSQL is asked, so that it removes its shared memory."""
        processes.end_all(lambda: [pid for pid in self._all() if _is_supervisor(pid)])
        databases = str(self._folder / "databases")
        servers = [pid for pid in processes.every() if f"-D {databases} " in processes.command_line(pid)]
        processes.send(servers, signal.SIGQUIT)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        while any(processes.status(pid) for pid in servers) and time.monotonic() < deadline:
            time.sleep(0.02)
        processes.end_all(lambda: {*self._all(), *(pid for pid in servers if processes.status(pid))})

    def _marked(self, name: str) -> list[int]:
        place = f"{self._cluster}/{name}"
        return [pid for pid in processes.every() if processes.setting(pid, PLACE) == place]

    def _all(self) -> set[int]:
        places = ((pid, processes.setting(pid, PLACE) or "") for pid in processes.every())
        marked = [pid for pid, place in places if place.startswith(f"{self._cluster}/")]
        return processes.with_descendants(marked) - {os.getpid()}


def _is_supervisor(pid: int) -> bool:
    return "/infra/supervisor.py " in processes.command_line(pid)
