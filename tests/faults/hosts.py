"""Hosts of a Ray cluster that are added, taken away and killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from tests.platform.driving import descendants


class Hosts:
    """A Ray cluster whose nodes stand for hosts: a head without processors, and others as they are added."""

    def __init__(self, folder: str) -> None:
        from ray.cluster_utils import Cluster

        self._node = {"include_dashboard": False, "object_store_memory": 80 * 2**20}
        self._cluster = Cluster(
            initialize_head=True, head_node_args={**self._node, "num_cpus": 0, "temp_dir": folder}
        )
        self.address: str = self._cluster.address
        self._nodes: dict[int, Any] = {}

    def add(self) -> None:
        """Adds a host of one processor."""
        node = self._cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        [raylet] = node.all_processes["raylet"]
        self._nodes[raylet.process.pid] = node
        self._cluster.wait_for_nodes()

    def of(self, pid: int) -> int:
        """The host that a worker runs on, by its raylet."""
        parent = psutil.Process(pid).ppid()
        assert parent in self._nodes
        return parent

    def take_away(self, host: int) -> None:
        """Announces that a host will be gone in a minute."""
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", self.address]
        command += ["--node-id", self._nodes[host].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "wanted back", "--deadline-remaining-seconds", "60"]
        subprocess.run(command, check=True, capture_output=True)

    def kill(self, host: int) -> None:
        """Kills a host: its raylet and all workers at once, unannounced."""
        for process in [psutil.Process(host), *descendants(host)]:
            process.kill()

    def running(self, actor: str) -> list[int]:
        """The hosts that an actor of a class runs on."""
        return [
            host
            for host in self._nodes
            if any(child.name().startswith(f"ray::{actor}") for child in descendants(host))
        ]

    def end(self) -> None:
        """Ends all of it."""
        self._cluster.shutdown()  # type: ignore[no-untyped-call]
