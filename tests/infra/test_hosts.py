"""Hosts as such: what their network and their processes promise. Nothing of Ray runs here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from infra import processes
from infra.errors import Impossible
from infra.hosts import Hosts, check
from infra.layout import folder, locked
from infra.nodes import PLACE
from tests.infra.clusters import leftovers, own_name
from tests.platform.driving import wait_until

pytestmark = pytest.mark.fault

SERVER = "import socket; s = socket.create_server(('', 9000)); [s.accept() for _ in iter(int, 1)]"
NAMES = ("alpha", "beta")


class TwoHosts:
    """Two hosts whose first process sleeps."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, folder(name)
        self.hosts = Hosts(name, self.folder)
        with locked(name):
            (self.folder / "ray").mkdir(exist_ok=True)
            self.addresses = self.hosts.make(NAMES)
            for host in NAMES:
                self.boot(host)

    def boot(self, host: str) -> None:
        environment = {"PATH": os.environ["PATH"], PLACE: f"{self.name}/{host}"}
        self.hosts.boot(host, ["sleep", "1000"], environment)

    def python(self, host: str, program: str) -> subprocess.CompletedProcess[str]:
        words = self.hosts.enter(host, [sys.executable, "-c", program])
        return subprocess.run(words, capture_output=True, text=True, timeout=30)

    def serve(self, host: str) -> subprocess.Popen[bytes]:
        words = self.hosts.enter(host, [sys.executable, "-c", SERVER])
        return subprocess.Popen(words, env=os.environ | {PLACE: f"{self.name}/{host}"})

    def connect(self, host: str, to: str) -> str:
        """The last line of an attempt to connect: empty if it succeeds."""
        program = f"import socket; socket.create_connection(('{to}', 9000), timeout=1).close()"
        return self.python(host, program).stderr.strip().rpartition("\n")[2]


@pytest.fixture
def two() -> Iterator[TwoHosts]:
    try:
        check()
    except Impossible as reason:
        pytest.skip(str(reason))
    made = TwoHosts(own_name("h"))
    yield made
    made.hosts.down()
    shutil.rmtree(made.folder, ignore_errors=True)


def test_a_host_reaches_its_neighbour_by_name_until_the_cable_is_pulled(two: TwoHosts) -> None:
    server = two.serve("beta")
    wait_until(lambda: not two.connect("alpha", "beta"), "alpha reaches beta", 20.0)
    two.hosts.cut("beta")
    assert two.hosts.is_cut("beta")
    assert "Timeout" in two.connect("alpha", "beta") or "No route" in two.connect("alpha", "beta")
    two.hosts.heal("beta")
    assert not two.hosts.is_cut("beta")
    wait_until(lambda: not two.connect("alpha", "beta"), "alpha reaches beta again", 20.0)
    server.kill()
    server.wait()


def test_nothing_leaves_the_network_and_nothing_gets_in(two: TwoHosts) -> None:
    assert "unreachable" in two.connect("alpha", "192.0.2.1")
    with pytest.raises(OSError, match=r"No route to host|unreachable"):
        socket.create_connection((two.addresses["beta"], 9000), timeout=5)


def test_a_host_has_a_name_and_processes_and_shared_memory_of_its_own(two: TwoHosts) -> None:
    program = (
        "import os, platform; print(platform.node(), os.path.ismount('/dev/shm'), os.listdir('/dev/shm'))"
    )
    Path(f"/dev/shm/{two.name}").touch()
    try:
        assert two.python("alpha", program).stdout == "alpha True []\n"
    finally:
        Path(f"/dev/shm/{two.name}").unlink()
    listed = two.python(
        "alpha", "import os; print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit()))"
    )
    assert listed.stdout.startswith("[1, ")
    assert listed.stdout.count(",") == 1  # the first process and the one that asks


def test_a_command_dies_with_the_process_that_runs_it(two: TwoHosts) -> None:
    server = two.serve("beta")
    wait_until(lambda: len(two.hosts.processes("beta")) == 2, "it runs", 20.0)
    server.kill()
    server.wait()
    wait_until(lambda: len(two.hosts.processes("beta")) == 1, "it is gone", 20.0)


def test_power_off_ends_everything_on_the_host_and_it_boots_again(two: TwoHosts) -> None:
    server = two.serve("beta")
    wait_until(lambda: len(two.hosts.processes("beta")) == 2, "it runs", 20.0)
    processes.end_all(lambda: two.hosts.processes("beta"))
    assert two.hosts.first_process("beta") is None
    assert server.wait(20.0) != 0
    assert two.hosts.first_process("alpha") is not None
    two.boot("beta")
    assert "refused" in two.connect("alpha", "beta")  # it is there, and nobody listens


def test_nothing_is_left_also_where_the_folder_is_lost(two: TwoHosts) -> None:
    server = two.serve("beta")
    assert leftovers(two.name, two.addresses["alpha"])
    shutil.rmtree(two.folder)
    Hosts(two.name, two.folder).down()
    server.wait()
    assert leftovers(two.name, two.addresses["alpha"]) == []
