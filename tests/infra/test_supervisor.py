"""The supervisor with services of a few lines of shell."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from infra import processes
from tests.platform.driving import ROOT, wait_until

SECONDS = 20.0


class Supervised:
    """A supervisor of one service, in a folder where the service writes what it does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, script: str, grace_seconds: float = 10.0, **fields: Any) -> subprocess.Popen[bytes]:
        service = {"name": "service", "command": ["sh", "-c", f"cd {self.folder}\n{script}"], **fields}
        told = {"services": [service], "grace_seconds": grace_seconds}
        (self.folder / "services.json").write_text(json.dumps(told))
        words = [sys.executable, str(ROOT / "infra" / "supervisor.py"), str(self.folder / "services.json")]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(words, stdout=log)
        return self.process

    def lines(self, name: str) -> list[str]:
        """What the service has written to a file, whole lines only."""
        path = self.folder / name
        return [line for line in (path.read_text() if path.exists() else "").split("\n")[:-1] if line]

    def wait_for(self, name: str, count: int) -> list[str]:
        wait_until(lambda: len(self.lines(name)) >= count, f"{count} lines in {name}", SECONDS)
        return self.lines(name)

    def end(self) -> None:
        if self.process is not None:
            processes.send(processes.with_descendants([self.process.pid]))
            self.process.wait()


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    made = Supervised(tmp_path)
    yield made
    made.end()


def gone(pid: str) -> bool:
    return not processes.status(int(pid))


def test_a_service_that_ends_starts_again_without_what_it_left_behind(supervised: Supervised) -> None:
    supervised.start("sleep 1000 & echo $! >> helpers; exit 3")
    first, second = supervised.wait_for("helpers", 2)[:2]
    assert gone(first)
    assert first != second


def test_a_service_ends_with_its_heart(supervised: Supervised) -> None:
    """The program itself goes on, as `ray start --block` does without its raylet."""
    supervised.start("sleep 987 & echo $! >> hearts; exec sleep 1000", heart="sleep 987")
    heart = int(supervised.wait_for("hearts", 1)[0])
    wait_until(lambda: f"up: process {heart}" in supervised.lines("log")[-1], "it has been seen", SECONDS)
    processes.send([heart], signal.SIGTERM)
    assert int(supervised.wait_for("hearts", 2)[1]) != heart


def test_a_service_is_asked_to_end_and_given_time(supervised: Supervised) -> None:
    process = supervised.start(
        "trap 'sleep 1; echo saved >> saved; exit' TERM; echo . >> up; sleep 1000 & wait"
    )
    supervised.wait_for("up", 1)
    process.terminate()
    assert process.wait(SECONDS) == 0
    assert supervised.lines("saved") == ["saved"]
    assert supervised.lines("up") == ["."]


def test_a_service_that_does_not_end_is_killed_after_the_grace_period(supervised: Supervised) -> None:
    script = "trap '' TERM; echo $$ >> up; while true; do sleep 0.1; done"
    process = supervised.start(script, grace_seconds=0.5)
    service = supervised.wait_for("up", 1)[0]
    process.terminate()
    assert process.wait(SECONDS) == 0
    wait_until(lambda: gone(service), "the service is gone", SECONDS)


def test_another_signal_can_be_the_one_that_asks(supervised: Supervised) -> None:
    traps = "trap 'echo fast >> how; exit' INT; trap 'echo slow >> how; exit' TERM"
    script = f"{traps}; echo . >> up; while true; do sleep 0.1; done"
    process = supervised.start(script, stop_signal="SIGINT")
    supervised.wait_for("up", 1)
    process.terminate()
    assert process.wait(SECONDS) == 0
    assert supervised.lines("how") == ["fast"]


def test_orphans_are_adopted_and_their_exit_codes_taken(supervised: Supervised) -> None:
    script = "(setsid sh -c 'echo $$ >> orphans; exec sleep 0.2' &); exec sleep 1000"
    process = supervised.start(script)
    orphan = int(supervised.wait_for("orphans", 1)[0])
    wait_until(lambda: not Path(f"/proc/{orphan}").exists(), "not even an exit code is left", SECONDS)
    assert process.poll() is None
