"""A real Ray head for tests: started, killed and started again at the same address."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import psutil
from infra.answers import living_nodes
from tests.platform.driving import ROOT, alive, descendants, environment, free_port, wait_until


class Head:
    """One head on loopback with its dashboard, its token and two CPUs."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="piste-"))  # short: a socket path has at most 107 bytes
        self.token = self.folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self._ports = [free_port() for _ in range(3)]
        self.address = f"http://127.0.0.1:{self._ports[1]}"
        self._started: list[psutil.Process] = []
        self.start()

    def start(self) -> None:
        """Starts it; returns when jobs are taken."""
        gcs, dashboard, agent = self._ports
        ray = Path(sys.executable).parent / "ray"
        command = [ray, "start", "--head", "--block", "--port", gcs, "--dashboard-port", dashboard]
        command += ["--dashboard-host", "127.0.0.1", "--dashboard-agent-listen-port", agent]
        command += ["--num-cpus", 2, "--object-store-memory", 100 * 2**20, "--temp-dir", self.folder / "ray"]
        settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                list(map(str, command)),
                env=self.environment(self.folder) | settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._ready, "the head's dashboard and its agent answer")
        self._started += [psutil.Process(self._process.pid), *descendants(self._process.pid)]

    @property
    def process_id(self) -> int:
        """The process that has started all the others."""
        return self._process.pid

    def environment(self, home: Path) -> dict[str, str]:
        """What processes need to know that use this head."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        return environment(home) | token

    def kill(self) -> None:
        """All its processes die at once."""
        self._started += descendants(self._process.pid)
        for process in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not alive(self._started), "the end of all the head's processes", 20.0)

    def _ready(self) -> bool:
        try:  # the agent, through which jobs are sent
            urllib.request.urlopen(f"http://127.0.0.1:{self._ports[2]}/", timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answers
        except OSError:
            return False
        return bool(living_nodes(self.address, self.token.read_text()))


def piste_job(
    head: Head, home: Path, *arguments: str | Path, path: Path = ROOT, seconds: float = 300.0
) -> tuple[int, str, str]:
    """Runs `python -m piste` against a head: exit code, stdout, stderr."""
    settings = {"RAY_API_SERVER_ADDRESS": head.address, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "piste", *map(str, arguments)],
        env=head.environment(home) | settings,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    return done.returncode, done.stdout, done.stderr
