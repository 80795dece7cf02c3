"""How long the relay takes to catch up with a run whose metrics have queued while nothing was shown.

    python tests/bench/bench_relay_catch_up.py [--metrics 100000]

The ledger is in SQLite, the view a real `mlflow server` (one worker, a SQLite store) on loopback. The relay's
peer is a bare loop of `MlflowClient.log_batch` with 1,000 of the same metrics a call into another run of the
same server, one half of it before the relay and one half after it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TARGET_SECONDS = 30.0
KEYS = 4

sys.path.insert(0, str(Path(__file__).parents[2]))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of an MLflow server of its own."""
    from tests.platform.driving import end_server, free_port, start_server

    port = free_port()
    server = start_server(folder / "served.db", port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        end_server(server)


def queued(folder: Path, metrics: int) -> Any:
    """A ledger with a run that has all its metrics and has not ended."""
    from piste.config import Recipe
    from piste.ledger import Ledger, Message, Row

    ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
    facts = dict.fromkeys(("recipe", "workload", "identity", "cell"), "bench")
    config = Recipe(workload="quadratic").model_dump(mode="json")
    directory = str(folder / "runs" / "run")
    ledger.create(id="run", seed=0, config=config, provenance={}, directory=directory, **facts)
    attempt = ledger.begin_attempt("run")
    for start in range(0, metrics, 1000):
        numbers = range(start, min(start + 1000, metrics))
        rows = tuple(Row(f"train/metric-{n % KEYS}", n // KEYS, n / 7, 1_000_000 + n) for n in numbers)
        ledger.apply(Message("run", attempt, start, rows))
    return ledger


def catch_up(folder: Path, uri: str, metrics: int) -> tuple[float, float]:
    """Seconds of the relay, from a run that MLflow does not know to all of it shown, and of its peer."""
    from mlflow.entities import Metric

    from piste.ledger import number
    from piste.tracking import Relay, client

    ledger = queued(folder, metrics)
    rows = ledger.metrics_after("run", 0, metrics)
    peer = client(uri)
    bare = peer.create_run("0").info.run_id
    batches = [rows[start : start + 1000] for start in range(0, metrics, 1000)]
    half = len(batches) // 2

    def log(those: list[Any]) -> float:
        begun = time.perf_counter()
        for batch in those:
            peer.log_batch(bare, [Metric(row.key, number(row), row.timestamp, row.step) for row in batch])
        return time.perf_counter() - begun

    spent = log(batches[:half])
    relay = Relay(ledger, "run", uri)
    begun = time.perf_counter()
    relay.step()
    ours = time.perf_counter() - begun
    assert relay.pending() == 0
    spent += log(batches[half:])
    assert relay.mlflow_run_id is not None
    shown = peer.get_metric_history(relay.mlflow_run_id, "train/metric-0")
    assert len(shown) == len({point.step for point in shown}) == metrics // KEYS
    return ours, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--metrics", type=int, default=100_000)
    metrics = parser.parse_args().metrics
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PISTE_HOME"] = str(folder)
        with served(folder) as uri:
            ours, peer = catch_up(folder, uri, metrics)
    reached = "PASS" if ours <= TARGET_SECONDS * metrics / 100_000 else "MISS"
    show(f"{metrics:,} queued metrics", ours, "s", f"   target {TARGET_SECONDS:g} a 100,000   {reached}")
    show("relay to an MLflow server", metrics / ours, "metrics/s")
    show("  bare log_batch(1000), its peer", metrics / peer, "metrics/s", f"   ratio {peer / ours:.2f}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def show(name: str, value: float, unit: str, more: str = "") -> None:
    print(f"{name:<34} {value:10.1f} {unit:<9}{more}", flush=True)


if __name__ == "__main__":
    main()
