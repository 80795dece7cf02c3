"""What recording costs: one `append`, eight writers into one SQLite ledger, the relay to MLflow.

    python tests/bench/bench_ledger.py [--metrics 40000]

The relay's peer, timed in turn with it, is a bare loop of `MlflowClient.log_batch` with 1,000 metrics a call
into another store of the same kind.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROCESSES = 8
CHUNKS = 4


def columns(run_id: str, folder: Path) -> dict[str, Any]:
    from piste.config import Recipe

    config = Recipe(workload="quadratic").model_dump(mode="json")
    facts = dict.fromkeys(("recipe", "workload", "identity", "cell"), "bench")
    return {"id": run_id, "seed": 0, "config": config, "provenance": {}, "directory": str(folder), **facts}


def append_microseconds(folder: Path, appends: int) -> float:
    """Median cost of taking one metric while the buffer's thread writes to a real ledger."""
    from piste.buffer import MetricBuffer
    from piste.ledger import Ledger

    ledger = Ledger(f"sqlite:///{folder / 'append.db'}")
    ledger.create(**columns("run", folder))
    buffer = MetricBuffer(ledger.apply, "run", ledger.begin_attempt("run"))
    costs = []
    for step in range(appends):
        start = time.perf_counter_ns()
        buffer.append({"loss": 1.0}, step)
        costs.append(time.perf_counter_ns() - start)
    buffer.close()
    assert ledger.count_after("run") == appends
    return statistics.median(costs) / 1000


def eight_writers(folder: Path, metrics: int) -> tuple[float, int]:
    """Committed metrics a second of eight processes, and how many are read back."""
    from piste.buffer import MetricBuffer
    from piste.ledger import Ledger

    url = f"sqlite:///{folder / 'eight.db'}"
    Ledger(url).engine.dispose()
    gate, starter = os.pipe()
    children = []
    for number in range(PROCESSES):
        child = os.fork()
        if child == 0:
            os.close(starter)
            ledger = Ledger(url)
            ledger.create(**columns(f"run-{number}", folder))
            attempt = ledger.begin_attempt(f"run-{number}")
            os.read(gate, 1)
            buffer = MetricBuffer(ledger.apply, f"run-{number}", attempt)
            for step in range(metrics // PROCESSES):
                buffer.append({"loss": float(step)}, step)
            buffer.close()
            os._exit(0)
        children.append(child)
    os.close(gate)
    time.sleep(2.0)  # all have opened the ledger
    start = time.perf_counter()
    os.close(starter)
    codes = [os.waitpid(child, 0)[1] for child in children]
    seconds = time.perf_counter() - start
    assert codes == [0] * PROCESSES, codes
    found = sum(Ledger(url).count_after(f"run-{number}") for number in range(PROCESSES))
    return found / seconds, found


def relay_rates(folder: Path, metrics: int) -> tuple[float, float]:
    """Metrics a second of the relay and of bare `log_batch` calls, each in `CHUNKS` turns."""
    from mlflow.entities import Metric

    from piste.ledger import Ledger, Message, Row
    from piste.tracking import Relay, client

    ledger = Ledger(f"sqlite:///{folder / 'relay.db'}")
    uri = f"sqlite:///{folder / 'shown.db'}"
    client(uri)
    peer = client(f"sqlite:///{folder / 'peer.db'}")
    ledger.create(**columns("run", folder / "runs" / "run"))
    attempt = ledger.begin_attempt("run")
    relay = Relay(ledger, "run", uri)
    bare = peer.create_run("0").info.run_id
    spent = {"relay": 0.0, "peer": 0.0}
    size = metrics // CHUNKS
    for chunk in range(CHUNKS):
        batches = [range(start, start + 1000) for start in range(chunk * size, (chunk + 1) * size, 1000)]
        for batch in batches:
            ledger.apply(Message("run", attempt, 0, tuple(Row("loss", s, float(s), s) for s in batch)))
        begun = time.perf_counter()
        relay.step()
        spent["relay"] += time.perf_counter() - begun
        assert relay.pending() == 0
        begun = time.perf_counter()
        for batch in batches:
            peer.log_batch(bare, [Metric("loss", float(s), s, s) for s in batch])
        spent["peer"] += time.perf_counter() - begun
    return metrics / spent["relay"], metrics / spent["peer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--metrics", type=int, default=40_000)
    metrics = parser.parse_args().metrics
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rate, found = eight_writers(folder, metrics)  # first: it forks, and no thread runs yet
        show("8 writers, one SQLite ledger", rate, "metrics/s", 5000, rate >= 5000)
        show("  counted back", found, "metrics", metrics, found == metrics)
        cost = append_microseconds(folder, metrics)
        show("append of one metric, median", cost, "us", 50, cost <= 50)
        relayed, bare = relay_rates(folder, metrics)
        show("relay to MLflow on SQLite", relayed, "metrics/s", 4000, relayed >= 4000)
        print(f"{'  bare log_batch(1000), its peer':<34} {bare:10.1f} metrics/s   ratio {relayed / bare:.2f}")


def show(name: str, value: float, unit: str, target: float, reached: bool) -> None:
    print(f"{name:<34} {value:10.1f} {unit:<9}   target {target:<6}   {'PASS' if reached else 'MISS'}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
