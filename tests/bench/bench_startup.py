"""How long a user waits: `piste --help`, `piste ls`, and the first logged step of `piste run --local`.

    python tests/bench/bench_startup.py [--repeats 5]

The first logged step is the first metric's timestamp in the ledger minus the start of the process; its peer,
timed in turn with it, is `python -c "import torch"`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = '# a bowl\nworkload = "quadratic"\n[optimizer]\nname = "sgd"\nlr = 0.5\n'


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Wall time of a command."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def first_step(recipe: Path, home: Path) -> float:
    """Seconds from the start of `piste run --local` to its first logged metric."""
    from piste.ledger import Ledger

    environment = os.environ | {"PISTE_HOME": str(home)}
    start = time.time()
    command = [sys.executable, "-m", "piste", "run", str(recipe), "--local"]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    ledger = Ledger(f"sqlite:///{home / 'ledger.db'}")
    first = ledger.metrics_after(ledger.runs()[0].id, 0, 1)[0]
    return first.timestamp / 1000 - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    plain = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "bowl.toml"
        recipe.write_text(RECIPE)
        home = Path(folder) / ".piste"
        first_step(recipe, home)  # warm-up: makes the stores
        times: dict[str, list[float]] = {"help": [], "ls": [], "torch": [], "step": []}
        for _ in range(repeats):
            times["help"].append(seconds([sys.executable, "-m", "piste", "--help"], plain))
            times["ls"].append(seconds([sys.executable, "-m", "piste", "ls"], plain))
            times["torch"].append(seconds([sys.executable, "-c", "import torch"], plain))
            times["step"].append(first_step(recipe, home))
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(s / t for s, t in zip(times["step"], times["torch"], strict=True))
    print(f"{'piste --help':<34} {median['help']:7.2f} s   target 0.30   {_verdict(median['help'] <= 0.3)}")
    print(f"{'piste ls':<34} {median['ls']:7.2f} s   target 0.60   {_verdict(median['ls'] <= 0.6)}")
    print(
        f"{'first logged step, --local':<34} {median['step']:7.2f} s   import torch {median['torch']:.2f} s"
    )
    print(f"{'  ratio to import torch':<34} {ratio:7.2f}     target 2.50   {_verdict(ratio <= 2.5)}")


def _verdict(reached: bool) -> str:
    return "PASS" if reached else "MISS"


if __name__ == "__main__":
    main()
