"""Hosts on this machine, each in Linux namespaces of its own, on one network that leads nowhere.

A host has its own network device, process table, host name, /dev/shm and temporary folder of Ray; the
file system is shared by all. What a host sends can reach the other hosts and nothing else. The kernel is
asked what there is, so that nothing goes stale: a host is its network namespace, and it is up while
there is a process 1 in it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra import processes
from infra.errors import Impossible, Problem

DEVICE = "eth0"
START_SECONDS = 10.0
SHARED_MEMORY = "512m"
IPV6 = "/proc/sys/net/ipv6/conf/all/disable_ipv6"
TOOLS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"}
# What a host's first process does before it becomes the supervisor: $1 is the cluster's folder, $2 the host.
START = f"""
set -e
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/$2/ray" "$1/ray"
mount -t tmpfs -o size={SHARED_MEMORY},mode=1777 tmpfs /dev/shm
hostname "$2" 2>/dev/null || echo "$2" > /proc/sys/kernel/hostname
touch "$1/$2/started"
shift 2
exec "$@"
"""


def _run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if check and done.returncode:
        raise Problem(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def detach(words: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> None:
    """Starts a program that goes on when this one has ended."""
    with log.open("ab") as output:
        subprocess.run(
            ["setsid", "--fork", *words],
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=True,
        )


def check() -> None:
    """Finds out whether this machine can make such hosts.

    Raises:
        Impossible: With what is missing.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Impossible("network namespaces need Linux and root")
    if missing := sorted({package for tool, package in TOOLS.items() if not shutil.which(tool)}):
        raise Impossible(f"network namespaces need the packages {', '.join(missing)}")
    if (subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True)).returncode:
        raise Impossible("network namespaces are not allowed here")


class Hosts:
    """The hosts of one cluster.

    Args:
        cluster: The cluster's name, letters and digits: each has a network of its own.
        folder: Where it keeps its files.
    """

    def __init__(self, cluster: str, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        self._switch = f"{cluster}.switch"
        # A range that is set aside for tests of networks and is in use nowhere else (RFC 2544).
        number = zlib.crc32(cluster.encode()) % 512
        self._network = f"198.{18 + number // 256}.{number % 256}"

    def make(self, names: Sequence[str]) -> dict[str, str]:
        """Makes hosts that are not there yet, switched off; all names of the cluster, in the same order.

        Returns:
            Their addresses.
        """
        addresses = {name: f"{self._network}.{11 + i}" for i, name in enumerate(names)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self._folder / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
        have = self._spaces()
        if self._switch not in have:
            _run("ip", "netns", "add", self._switch)
            _run("ip", "-n", self._switch, "link", "add", "name", "bridge0", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "dev", "bridge0", "up")
        # From outside, the hosts' addresses are an error at once: nothing that is meant for them gets out.
        _run("ip", "route", "replace", "unreachable", f"{self._network}.0/24")
        for name, address in addresses.items():
            (self._folder / name / "ray").mkdir(parents=True, exist_ok=True)
            if self._space(name) not in have:
                self._wire(name, address)
        return addresses

    def _wire(self, name: str, address: str) -> None:
        space, cable = self._space(name), ("ip", "-n", self._switch, "link")
        _run("ip", "netns", "add", space)
        _run(*cable, "add", "name", _port(name), "type", "veth", "peer", "name", DEVICE, "netns", space)
        _run("ip", "netns", "exec", space, "sh", "-c", f"test ! -e {IPV6} || echo 1 > {IPV6}")
        _run("ip", "-n", space, "address", "add", f"{address}/24", "dev", DEVICE)
        for device in ("lo", DEVICE):
            _run("ip", "-n", space, "link", "set", "dev", device, "up")
        _run(*cable, "set", "dev", _port(name), "master", "bridge0", "up")

    def boot(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Switches a host on; `command` is its process 1.

        Raises:
            Problem: It does not start.
        """
        started, log = self._folder / name / "started", self._folder / name / "boot.log"
        started.unlink(missing_ok=True)
        own = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        words = ["ip", "netns", "exec", self._space(name), "unshare", *own, "sh", "-c", START, "start"]
        detach([*words, str(self._folder), name, *command], environment, self._folder, log)
        deadline = time.monotonic() + START_SECONDS
        while not started.exists():
            if time.monotonic() > deadline:
                raise Problem(f"{name} does not start: {log.read_text(errors='replace').strip()}")
            time.sleep(0.01)

    def first_process(self, name: str) -> int | None:
        """Process 1 of a host, by its id outside; None while the host is switched off."""
        for pid in self._inside(self._space(name)):
            if processes.status(pid).get("NSpid", "").split()[1:] == ["1"]:
                return pid
        return None

    def processes(self, name: str) -> list[int]:
        """All processes on a host, by their ids outside."""
        first = self.first_process(name)
        table = _table(first) if first is not None else None
        return [p for p in self._inside(self._space(name)) if table is not None and _table(p) == table]

    def enter(self, name: str, command: Sequence[str]) -> list[str]:
        """The words that run a command on a host, in this folder; it dies with the process that runs them.

        Raises:
            Problem: The host is switched off.
        """
        if (first := self.first_process(name)) is None:
            raise Problem(f"{name} is switched off: boot it")
        spaces = ["--net", "--mount", "--uts", "--ipc", "--pid"]
        return [
            *("nsenter", "--target", str(first), *spaces, "setpriv", "--pdeathsig", "KILL"),
            *("env", f"--chdir={os.getcwd()}", *command),
        ]

    def cut(self, name: str) -> None:
        """Pulls a host's network cable: what is sent vanishes, and nobody is told."""
        _run("ip", "-n", self._switch, "link", "set", "dev", _port(name), "down")

    def heal(self, name: str) -> None:
        """Plugs a host's network cable in again."""
        _run("ip", "-n", self._switch, "link", "set", "dev", _port(name), "up")

    def is_cut(self, name: str) -> bool:
        """Whether a host's network cable is pulled."""
        shown = _run("ip", "-n", self._switch, "-j", "link", "show", "dev", _port(name), check=False)
        return any("UP" not in link["flags"] for link in json.loads(shown or "[]"))

    def down(self) -> None:
        """Ends everything on all hosts and removes them, also those of which no file knows any more."""
        spaces = self._spaces()
        processes.end_all(lambda: [pid for space in spaces for pid in self._inside(space)])
        for space in spaces:
            _run("ip", "netns", "delete", space)
        if _run("ip", "route", "show", "type", "unreachable", f"{self._network}.0/24"):
            _run("ip", "route", "delete", "unreachable", f"{self._network}.0/24")

    def _space(self, name: str) -> str:
        return f"{self._cluster}.{name}"

    def _spaces(self) -> set[str]:
        found = json.loads(_run("ip", "-j", "netns", "list") or "[]")
        return {space["name"] for space in found if space["name"].startswith(f"{self._cluster}.")}

    def _inside(self, space: str) -> list[int]:
        return [int(pid) for pid in _run("ip", "netns", "pids", space, check=False).split()]


def _port(name: str) -> str:
    """The switch's end of a host's cable; a short name alone might read as one of `ip`'s own words."""
    return f"to-{name}"


def _table(pid: int) -> str | None:
    """Which process table a process is in."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None
