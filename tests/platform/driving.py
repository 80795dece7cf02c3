"""Driving piste from tests: recipes, processes, and what a run has left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from piste.checkpoints import CheckpointStore
from piste.ledger import Ledger

ROOT = Path(__file__).parents[2]
PACED = "tests.platform.paced"


class NoRelay:
    """In place of the relay's process, where the view in MLflow is not the subject."""

    def __init__(self, *_arguments: Any) -> None:
        pass

    def finish(self) -> dict[str, Any]:
        return {"mlflow_run_id": None, "pending": 0}

    def detach(self) -> None:
        pass


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def paced_recipe(folder: Path, resources: str = "", **pace: int | str) -> Path:
    """Writes a recipe of the paced workload whose records lie in `folder`."""
    lines = [f'workload = "{PACED}"', "[pace]", f'records = "{folder}"']
    lines += [f"{key} = {value}" for key, value in pace.items()]
    lines += ["[tracking]", "system_metrics = false", "[resources]", resources]
    return write(folder / "paced.toml", "\n".join(lines))


def steps_taken(folder: Path, rank: int = 0) -> list[tuple[int, int]]:
    """The `(step, pid)` that a rank has recorded, in their order."""
    path = folder / f"rank-{rank}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(step), int(pid)) for step, pid in (line.split() for line in lines if line.count(" ") == 1)]


def done_again(folder: Path, rank: int = 0) -> int:
    """How many steps a rank has taken more than once."""
    steps = [step for step, _ in steps_taken(folder, rank)]
    return len(steps) - len(set(steps))


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Polls an observable; fails when the deadline has passed."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def environment(home: Path, ledger: str | None = None) -> dict[str, str]:
    removed = {"MLFLOW_TRACKING_URI", "PISTE_LEDGER", "RAY_ADDRESS"}
    kept = {key: value for key, value in os.environ.items() if key not in removed}
    chosen = {} if ledger is None else {"PISTE_LEDGER": ledger}
    return kept | chosen | {"PISTE_HOME": str(home), "PYTHONPATH": str(ROOT)}


def start_piste(home: Path, *arguments: str | Path, ledger: str | None = None) -> subprocess.Popen[str]:
    """Starts `python -m piste` as a process."""
    command = [sys.executable, "-m", "piste", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment(home, ledger),
        cwd=home.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], seconds: float = 400.0) -> tuple[int, str, str]:
    """Waits for a process: exit code, stdout, stderr; kills it when the deadline has passed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {seconds:g} s:\n{out}\n{err}") from None
    return process.returncode, out, err


def ledger_of(home: Path) -> Ledger:
    return Ledger(f"sqlite:///{home / 'ledger.db'}")


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The model of a run's last checkpoint."""
    found = CheckpointStore(directory / "checkpoints").latest()
    assert found is not None, f"{directory} has no checkpoint"
    model: dict[str, torch.Tensor] = found[0]["model"]
    return model


def assert_same_weights(first: Path, second: Path) -> None:
    """The final weights of two runs are equal bit for bit."""
    a, b = final_weights(first), final_weights(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def alive(processes: list[psutil.Process]) -> list[str]:
    """The command lines of those that still run."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:120])
        except psutil.NoSuchProcess:
            pass
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(store: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{store}"]
    command += ["--artifacts-destination", str(store.parent / "served"), "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (store.parent / "server.log").open("ab") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
        except OSError:
            return False
        return True

    wait_until(answers, "the MLflow server answers")
    return server


def end_server(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
