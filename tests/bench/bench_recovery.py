"""From the SIGKILL of one of two workers to the next new step, against a bare Ray Train loop.

Both take the same small steps on two workers of one local Ray, write a line a step, keep a checkpoint every
five steps and stand at a step until the kill. The clock runs from the kill to the end of the first step that
nobody had finished before: the dead worker is noticed, the group replaced, libraries imported, the checkpoint
read, lost steps taken again. They alternate. The bare loop reports to Ray Train alone; ours is a run of piste
with its ledger and writer, without the relay. Ray Train looks at the workers of both twice a second, piste's
own setting.

    python tests/bench/bench_recovery.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TARGET = 12.0
STEPS, EVERY, HELD = 40, 5, 13


def bare(settings: Mapping[str, Any]) -> None:
    """The loop of a Ray Train worker that knows nothing of piste."""
    import ray.train
    import ray.train.torch
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, folder = ray.train.get_context().get_world_rank(), Path(settings["folder"])
    model = torch.nn.Linear(5, 1)
    network = ray.train.torch.prepare_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as directory:
            state = torch.load(Path(directory) / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start + 1, STEPS + 1):
        with (folder / f"rank-{rank}.txt").open("a") as file:
            file.write(f"{step} {os.getpid()}\n")
        while step == HELD and rank == 0 and not (folder / "go").exists():
            time.sleep(0.01)
        optimizer.zero_grad()
        loss = network(torch.randn(8, 5)).square().mean()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0 or step == STEPS:
            with tempfile.TemporaryDirectory() as directory:
                kept = None
                if rank == 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    torch.save(state, Path(directory) / "state.pt")
                    kept = ray.train.Checkpoint.from_directory(directory)
                ray.train.report({"loss": float(loss.detach())}, checkpoint=kept)


def run_bare(folder: Path) -> None:
    """Trains in a bare Ray Train loop."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        bare,
        train_loop_config={"folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="bare", storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=1)
        ),
    ).fit()


def run_ours(folder: Path) -> None:
    """Trains as a run of piste."""
    import piste
    from piste import running

    table = {
        "workload": "tests.platform.paced",
        "pace": {"steps": STEPS, "records": str(folder), "hold_at": HELD},
        "checkpoints": {"every": EVERY},
        "resources": {"workers": 2, "max_failures": 1},
        "tracking": {"system_metrics": False},
    }
    result = piste.run(running.resolve(table, "bench"))
    assert [step for step, _ in result.history("train/loss")] == list(range(1, STEPS + 1))


def recovery(train: Callable[[Path], None], folder: Path) -> float:
    """Seconds from the kill of rank 1 to the first new step of rank 0."""
    from tests.platform.driving import steps_taken, wait_until

    seconds: list[float] = []

    def at(rank: int) -> int:
        taken = steps_taken(folder, rank)
        return taken[-1][0] if taken else 0

    def kill() -> None:
        wait_until(lambda: at(0) == at(1) == HELD, f"step {HELD}")
        killed = time.perf_counter()
        os.kill(steps_taken(folder, 1)[-1][1], signal.SIGKILL)
        (folder / "go").touch()
        wait_until(lambda: at(0) > HELD, "the next new step")
        seconds.append(time.perf_counter() - killed)

    folder.mkdir()
    killer = threading.Thread(target=kill)
    killer.start()
    train(folder)
    killer.join()
    return seconds[0]


def main() -> int:
    """Prints one line and returns 0 where the target is met."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"PISTE_HOME": f"{folder}/.piste", "PYTHONPATH": str(ROOT)}
        from tests.platform.driving import NoRelay

        from piste import relay_process
        from piste.config import Resources
        from piste.training import cluster

        relay_process.RelayProcess = NoRelay  # type: ignore[assignment, misc]
        measured: dict[str, list[float]] = {"ours": [], "bare": []}
        with cluster(Resources()):
            for number in range(arguments.rounds):
                for name in ("ours", "bare") if number % 2 else ("bare", "ours"):
                    train = run_ours if name == "ours" else run_bare
                    measured[name].append(recovery(train, Path(folder) / f"{name}-{number}"))
                print(
                    f"  round {number}: ours {measured['ours'][-1]:.1f} s  bare {measured['bare'][-1]:.1f} s"
                )
    ours, bare_loop = (statistics.median(measured[name]) for name in ("ours", "bare"))
    verdict = "PASS" if ours <= TARGET else "MISS"
    print(
        f"recovery  worker kill to next new step {ours:.1f} s  bare Ray Train {bare_loop:.1f} s  "
        f"target {TARGET:g} s  load {os.getloadavg()[0]:.1f}  {verdict}"
    )
    return 0 if verdict == "PASS" else 1


if __name__ == "__main__":
    raise SystemExit(main())
