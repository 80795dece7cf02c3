"""A cluster for tests, driven as a user drives it: by the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from infra import processes
from infra.layout import folder
from infra.nodes import PLACE

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "infra" / "cluster.py"


class ClusterCommand:
    """`infra/cluster.py` for the cluster of one name.

    Args:
        name: The cluster's.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def folder(self) -> Path:
        return folder(self.name)

    def words(self, *words: str) -> list[str]:
        return [sys.executable, str(COMMAND), *words]

    @property
    def environment(self) -> dict[str, str]:
        told = {"PISTE_CLUSTER": self.name, "PYTHONPATH": str(ROOT)}
        return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | told

    def ask(self, *words: str, seconds: float = 200.0) -> subprocess.CompletedProcess[str]:
        """Runs a verb."""
        return subprocess.run(
            self.words(*words), env=self.environment, capture_output=True, text=True, timeout=seconds
        )

    def tell(self, *words: str, seconds: float = 200.0) -> str:
        """Runs a verb that must succeed; what it prints."""
        done = self.ask(*words, seconds=seconds)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Starts a verb."""
        return subprocess.Popen(self.words(*words), env=self.environment, stdout=subprocess.PIPE, text=True)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.tell("status", "--json"))
        return found

    def nodes(self, host: str) -> list[str]:
        """The ids of the Ray nodes that are alive on a host."""
        status = self.status()
        address = next(row["address"] for row in status["hosts"] if row["host"] == host)
        return [node for node, at in status["nodes"].items() if at == address]

    def seconds_until(self, nodes: int, limit: float = 80.0) -> float:
        """How long it takes until so many Ray nodes are alive and MLflow answers."""
        began = time.monotonic()
        self.tell("wait", f"--nodes={nodes}", f"--seconds={limit}", seconds=limit + 30.0)
        return time.monotonic() - began


@contextmanager
def started(name: str, *options: str) -> Iterator[ClusterCommand]:
    """A cluster that is up; skips where there can be none."""
    cluster = ClusterCommand(name)
    try:
        done = cluster.ask("up", *options, seconds=240.0)
        if done.returncode == 77:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr + logs(cluster.folder)
        yield cluster
    finally:
        cluster.tell("down")


def logs(cluster_folder: Path) -> str:
    """The end of every log."""
    return "".join(f"\n{path}:\n{path.read_text()[-2000:]}" for path in cluster_folder.glob("*/*.log"))


def own_name(prefix: str) -> str:
    """A name that no other test session uses at the same time."""
    return f"{prefix}{os.getpid() % 10**7}"


def leftovers(name: str, address: str) -> list[str]:
    """What a cluster with a host at this address has left behind: namespaces, routes, processes, files.

    Args:
        name: The cluster's.
        address: Of one of its hosts.
    """
    found = [str(folder(name))] if folder(name).exists() else []
    if shutil.which("ip"):
        found += [line for line in _lines("ip", "netns", "list") if line.startswith(f"{name}.")]
        found += [line for line in _lines("ip", "route") if address.rpartition(".")[0] in line]
    return found + [processes.command_line(pid) for pid in every_process(name)]


def every_process(name: str) -> list[int]:
    """All processes that were started on a cluster's hosts."""
    places = {pid: processes.setting(pid, PLACE) or "" for pid in processes.every()}
    return [pid for pid, place in places.items() if place.startswith(f"{name}/")]


def _lines(*words: str) -> list[str]:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
