"""A relay as a process of its own, so that a slow or dead tracking server never slows a step."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piste.errors import PisteError
from piste.ledger import Ledger, without_password
from piste.tracking import TERMINAL, Kind, Relay, relay_of

if TYPE_CHECKING:
    from piste.sweep_tracking import SweepRelay

POLL_SECONDS = 1.0
START_SECONDS = 0.2  # between two looks at whether something computes
GRACE_SECONDS = 20.0


class RelayProcess:
    """The relay of one run or sweep, as a process of its own that outlives an interrupt and drains.

    Args:
        ledger_url: Where the ledger is.
        name: The run, or the sweep.
        uri: The MLflow store.
        log: A file for what it prints.
        kind: Which of the two.
    """

    def __init__(self, ledger_url: str, name: str, uri: str, log: Path, kind: Kind = "run") -> None:
        plain, secret = without_password(ledger_url)  # anyone may read a command line
        command = [sys.executable, "-m", "piste.relay_process", plain, kind, name, uri]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end tells the relay that the driver is gone
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | secret,
                start_new_session=True,
                text=True,
            )

    def finish(self) -> dict[str, Any]:
        """Waits until the ended run is shown.

        Returns:
            `mlflow_run_id`, `mlflow_experiment_id` and `pending`; those that are unknown are left out.
        """
        try:
            output, _ = self._process.communicate(timeout=GRACE_SECONDS + 10)
            return dict(json.loads(output.strip().splitlines()[-1]))
        except (subprocess.TimeoutExpired, ValueError, IndexError):
            self._process.kill()
            self._process.wait()
            return {}

    def detach(self) -> None:
        """Leaves the relay to drain by itself: nobody waits for it after an interrupt."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.returncode = 0  # not ours to reap any more


def _status(ledger: Ledger, kind: Kind, name: str) -> str:
    return ledger.sweeps.get(name).status if kind == "sweep" else ledger.run(name).status


def _trials_begun(ledger: Ledger, sweep_id: str) -> tuple[int, int]:
    """How many trials of a sweep compute, and how many have ended."""
    trials = ledger.sweeps.trials(sweep_id)
    return sum(t.status == "running" for t in trials), sum(t.outcome is not None for t in trials)


def _await_work(ledger: Ledger, kind: Kind, name: str, driver_gone: threading.Event) -> None:
    """Waits until something computes: MLflow's import would slow the processes that are to start."""
    before: int | None = None
    while not driver_gone.is_set():
        with contextlib.suppress(PisteError):
            if (status := _status(ledger, kind, name)) in TERMINAL or (kind == "run" and status == "running"):
                return
            if kind == "sweep":
                running, ended = _trials_begun(ledger, name)
                before = ended if before is None else before
                if running > 0 or ended > before:
                    return
        driver_gone.wait(START_SECONDS)


def _follow(ledger_url: str, kind: Kind, name: str, uri: str) -> dict[str, Any]:
    """Relays until all is shown that has ended, or the driver is gone and nothing is left to push."""
    os.nice(19)  # below the workers, to which Ray gives 15
    driver_gone = threading.Event()

    def until_the_driver_goes() -> None:
        sys.stdin.read()
        driver_gone.set()

    threading.Thread(target=until_the_driver_goes, daemon=True).start()
    ledger = Ledger(ledger_url, patient=True)
    _await_work(ledger, kind, name, driver_gone)
    relay: Relay | SweepRelay | None = None
    give_up: float | None = None
    while True:
        gone, terminal = driver_gone.is_set(), False  # before the step: what it then shows is all there is
        with contextlib.suppress(PisteError):
            terminal = _status(ledger, kind, name) in TERMINAL
        try:
            relay = relay or relay_of(ledger, kind, name, uri)
            if relay.step() or (gone and not terminal):
                break
            give_up = None
        except Exception as error:
            print(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if gone or terminal:
            give_up = give_up or time.monotonic() + GRACE_SECONDS
            if time.monotonic() > give_up:
                break
            time.sleep(0.2)
        else:
            driver_gone.wait(POLL_SECONDS)
    if relay is None:
        return {}
    pending = relay.pending()
    ids = {"mlflow_run_id": relay.mlflow_run_id, "mlflow_experiment_id": relay.experiment_id}
    return {**ids, "pending": pending}


if __name__ == "__main__":
    url, kind, name, uri = sys.argv[1:5]
    print(json.dumps(_follow(url, "sweep" if kind == "sweep" else "run", name, uri)), flush=True)
