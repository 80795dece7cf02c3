"""Streams on Ray actors: events a second end to end, memory of a thousand streams, recovery from kills.

    python tests/bench/bench_streams.py [--streams 1000] [--events 10000] [--kills 5]

All on one local Ray with two shards. Throughput: gamma scores without a shift, from the source's draw to the
ledger's commit, in batches of 1,000; the peer is the algorithm alone on the same streams in this process.
Memory: the proportional set size of the driver, the writer and all actors of that run, its peak of a look
each half a second. Recovery: from the SIGKILL of a shard's actor to the first commit of what comes after it;
all streams are held to the offline recomputation, to the last bit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
EVENTS_A_SECOND, GIBIBYTES, SECONDS = 200_000, 2.0, 2.0


def verdict(passed: bool) -> str:
    return "PASS" if passed else "MISS"


def offline_rate(streams: int, events: int) -> float:
    """Events a second of the algorithm alone, the median of five streams."""
    from tests.workloads.offline_streams import offline

    from piste_workloads.stream import Config
    from piste_workloads.stream.config import Source

    config = Config(source=Source(streams=streams, events=events))
    offline(config, 0)  # compiles
    taken = []
    for number in range(5):
        start = time.perf_counter()
        offline(config, number)
        taken.append(time.perf_counter() - start)
    return events / statistics.median(taken)


class Memory(threading.Thread):
    """The largest sum of proportional set sizes of this process and Ray's workers, in GiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.workers = 0.0
        self._ended = threading.Event()

    def run(self) -> None:
        import psutil

        while not self._ended.wait(0.5):
            total, workers = 0, 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    worker = process.pid == os.getpid() or process.name().startswith("ray::")
                    if worker:
                        total += process.memory_full_info().pss
                        workers += 1
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            if total / 2**30 > self.peak:
                self.peak, self.workers = total / 2**30, workers

    def end(self) -> None:
        self._ended.set()
        self.join()


def throughput_and_memory(streams: int, events: int) -> tuple[float, Memory]:
    """Events a second of a run by its own metric, and its memory."""
    from piste import running
    from piste import streams as runs
    from piste.config import Resources, Tracking
    from piste.ledger import open_ledger
    from piste_workloads.stream import Config
    from piste_workloads.stream.config import Source

    ledger = open_ledger()
    config = Config(
        source=Source(streams=streams, events=events),
        resources=Resources(workers=2),
        tracking=Tracking(system_metrics=False),
    )
    run_id = runs.plan(ledger, "bench", config)
    memory = Memory()
    memory.start()
    result = running.execute(ledger, run_id, local=False)
    memory.end()
    assert result.status == "finished"
    assert result.metrics["stream/events"] == streams * events
    return result.metrics["time/events_per_s"], memory


def recoveries(kills: int) -> list[float]:
    """Seconds of each kill of a shard's actor."""
    from tests.workloads.killed_streams import follow_with_kills

    from piste.config import Resources, Tracking
    from piste.shards import Pace
    from piste_workloads.stream import Config
    from piste_workloads.stream.config import Source

    every = 4_000
    config = Config(
        seed=5,
        source=Source(streams=4, events=(kills + 1) * every, calibration=600),
        stream=Pace(batch=100),
        resources=Resources(workers=2, max_failures=kills),
        tracking=Tracking(system_metrics=False),
    )
    return follow_with_kills(config, [("shard", (n + 1) * every) for n in range(kills)])


def main() -> int:
    """Prints a line a figure and returns 0 where all targets are met."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=5)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"PISTE_HOME": f"{folder}/.piste", "PYTHONPATH": str(ROOT)}
        from tests.platform.driving import NoRelay

        from piste import relay_process
        from piste.config import Resources
        from piste.training import cluster

        relay_process.RelayProcess = NoRelay  # type: ignore[assignment, misc]
        alone = offline_rate(arguments.streams, arguments.events)
        with cluster(Resources(), dashboard=True):
            rate, memory = throughput_and_memory(arguments.streams, arguments.events)
            fast, small = rate >= EVENTS_A_SECOND, memory.peak <= GIBIBYTES
            print(
                f"{arguments.streams} streams end to end {rate:,.0f} events/s  the algorithm alone "
                f"{alone:,.0f}  ratio {rate / alone:.2f}  target {EVENTS_A_SECOND:,}  {verdict(fast)}"
            )
            print(
                f"memory of {memory.workers} processes {memory.peak:.2f} GiB  target {GIBIBYTES}  "
                f"{verdict(small)}",
                flush=True,
            )
            seconds = recoveries(arguments.kills)
    soon = statistics.median(seconds) <= SECONDS
    print(
        f"recovery of a killed actor {statistics.median(seconds):.1f} s of "
        f"{', '.join(f'{each:.1f}' for each in seconds)}  target {SECONDS}  load {os.getloadavg()[0]:.1f}  "
        f"{verdict(soon)}"
    )
    return 0 if fast and small and soon else 1


if __name__ == "__main__":
    raise SystemExit(main())
