"""What a job costs: until `piste submit` returns, until a small run has ended, and after the head's death.

    python tests/bench/bench_jobs.py [--repeats 5]

On a Ray head of its own with two CPUs. The peer of a submission is Ray's own `submit_job` of `python -c
pass`, in the same run; a small run is four steps on a quadratic bowl, in the job's driver.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

RECIPE = """workload = "quadratic"
[problem]
steps = 4
[tracking]
system_metrics = false
"""
SWEEP = """[sweep]
metric = "train/loss"
trials = 40
searcher = "random"
batch = 2
[sweep.space]
"optimizer.lr" = { uniform = [0.01, 0.2] }
"""


def bare(head: Any) -> tuple[float, float]:
    """Seconds until Ray's own client has sent a job that does nothing, and until that has ended."""
    program = (
        "import sys, time; from ray.job_submission import JobSubmissionClient as C; t = time.perf_counter();"
        "c = C(sys.argv[1]); j = c.submit_job(entrypoint=sys.executable + ' -c pass');"
        "print(time.perf_counter() - t)\n"
        "while not c.get_job_status(j).is_terminal(): time.sleep(0.02)\n"
        "print(time.perf_counter() - t)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, head.address],
        env=head.environment(head.folder),
        capture_output=True,
        text=True,
        check=True,
    )
    sent, ended = done.stdout.split()
    return float(sent), float(ended)


def ours(head: Any, home: Path, recipe: Path, name: str) -> tuple[float, float]:
    """Seconds until `piste submit` has returned, with its interpreter's start, and until the run ended."""
    from tests.platform.driving import ledger_of, wait_until
    from tests.platform.heads import piste_job

    start = time.perf_counter()
    submit = ("submit", "run", recipe, "--local", "--id", name, "--no-follow")
    code, _, err = piste_job(head, home, *submit)
    returned = time.perf_counter() - start
    assert code == 0, err
    ledger = ledger_of(home)
    wait_until(lambda: ledger.jobs.get(name).status == "succeeded", f"{name}'s end")
    return returned, time.perf_counter() - start


def head_loss(head: Any, home: Path, recipe: Path) -> float:
    """Seconds from the new head's readiness to the first new trial of a sweep whose head was killed."""
    from tests.platform.driving import ledger_of, wait_until
    from tests.platform.heads import piste_job

    code, _, err = piste_job(head, home, "submit", "sweep", recipe, "--id", "lost", "--no-follow")
    assert code == 0, err
    ledger = ledger_of(home)

    def ended() -> int:
        subject = ledger.jobs.get("lost").subject
        return sum(t.outcome is not None for t in ledger.sweeps.trials(subject)) if subject else 0

    wait_until(lambda: ended() > 3, "some trials", 300.0)
    head.kill()
    before = ended()
    head.start()
    start = time.perf_counter()
    subject = ledger.jobs.get("lost").subject or ""
    code, _, err = piste_job(head, home, "submit", "sweep", "--resume", subject, "--no-follow")
    assert code == 0, err
    wait_until(lambda: ended() > before, "a new trial", 300.0)
    return time.perf_counter() - start


def memory(pids: list[int]) -> float:
    """The memory of processes and all that they have started, in GiB: the share of each in what is shared."""
    processes = [psutil.Process(pid) for pid in pids]
    processes += [child for process in processes for child in process.children(recursive=True)]
    return sum(p.memory_full_info().pss for p in processes if p.is_running()) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    from tests.platform.driving import end_server, free_port, start_server, write
    from tests.platform.heads import Head

    folder = Path(tempfile.mkdtemp(prefix="piste-bench-"))
    head = Head()
    home = folder / ".piste"
    home.mkdir()
    server = start_server(home / "mlflow.db", free_port())
    try:
        recipe = write(folder / "recipe" / "bowl.toml", RECIPE)
        ours(head, home, recipe, "warm")
        times = [(bare(head), ours(head, home, recipe, f"run-{n}")) for n in range(repeats)]
        bare_sent, bare_ended, sent, ended = (
            statistics.median(t[a][b] for t in times) for a in (0, 1) for b in (0, 1)
        )
        print(f"piste submit returns   {sent:6.2f} s  (bare submit_job {bare_sent:.2f} s)   # target 2 s")
        print(f"a small run has ended  {ended:6.2f} s  (a bare no-op {bare_ended:.2f} s)   # target 6 s")
        used = memory([head.process_id, server.pid])
        print(
            f"head and MLflow        {used:6.2f} GiB                       # target 1.5 GiB with the platform"
        )
        swept = write(folder / "recipe" / "sweep.toml", RECIPE + SWEEP)
        seconds = head_loss(head, home, swept)
        print(f"resumed on a new head  {seconds:6.1f} s to its first new trial       # target 60 s")
    finally:
        end_server(server)
        head.kill()
        shutil.rmtree(head.folder, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
