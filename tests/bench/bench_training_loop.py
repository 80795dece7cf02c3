"""Tokens a second of the workload llm through its `Run`, against the same training in bare torch.

Both train the same model on the same batches with AdamW, clipping and a learning-rate schedule, in this
process on one thread; ours also measures, logs six metrics a step and writes them to a SQLite ledger.
They alternate, and the first of a pair changes from pair to pair. Timed are whole loops of `--steps` steps
without validation, samples and checkpoint of the end, from the first step's start to the last one's end.
Beside the wall clock stands the ratio by CPU time of the whole process, the ledger's writer included, which
other work on the machine disturbs less.

    python tests/bench/bench_training_loop.py [--pairs 5] [--steps 60]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from piste.config import validate
from piste.ledger import Ledger
from piste.workload import Run, local_run
from piste_workloads import llm
from piste_workloads.llm.batches import global_batch, windows
from piste_workloads.llm.config import Config
from piste_workloads.llm.model import GPT
from piste_workloads.llm.tokens import open_corpus

TARGET = 0.97


class _Done(Exception):
    """The last step has been taken."""


def clocks() -> tuple[float, float]:
    """Seconds of the wall clock and of this process's CPU time."""
    return time.perf_counter(), time.process_time()


def speeds(tokens: int, began: tuple[float, float], ended: tuple[float, float]) -> tuple[float, float]:
    """Tokens a second by both clocks."""
    wall, cpu = (end - begin for begin, end in zip(began, ended, strict=True))
    return tokens / wall, tokens / cpu


class TimedRun(Run):
    """A run that ends after a number of steps and knows when its first began and its last ended."""

    last = 0
    began = (0.0, 0.0)
    ended = (0.0, 0.0)

    def restore(self) -> None:
        """Called right before the first step."""
        self.began = clocks()

    @property
    def should_stop(self) -> bool:
        """Called behind every step's metrics."""
        self.last -= 1
        if self.last == 0:
            self.ended = clocks()
            raise _Done
        return False


def ours(config: Config, steps: int, directory: Path) -> tuple[float, float]:
    """Tokens a second through the workload and a real ledger."""
    ledger = Ledger(f"sqlite:///{directory / 'ledger.db'}")
    columns = {"recipe": "bench", "workload": "llm", "seed": 0, "config": {}, "provenance": {}}
    ledger.create(id="run", identity="", cell="", directory=str(directory), **columns)
    run = local_run("run", config, directory, ledger)
    run.__class__ = TimedRun
    assert isinstance(run, TimedRun)
    run.last = steps
    try:
        llm.train(config, run)
    except _Done:
        run.close()
    assert len(ledger.history("run", "train/loss")) == steps
    return speeds(steps * config.train.batch * config.model.context, run.began, run.ended)


def bare(config: Config, steps: int) -> tuple[float, float]:
    """Tokens a second of a loop that does the same and nothing else."""
    corpus = open_corpus(config)
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    model = GPT(config.model, corpus.tokenizer.vocab_size)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.1)
    context, device = config.model.context, torch.device("cpu")
    began = clocks()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * (1 + math.cos(math.pi * step / config.train.steps)) / 2
        starts = global_batch(config.seed, step, config.train.batch, len(corpus.train) - context)
        inputs, targets = windows(corpus.train, starts, context, device)
        optimizer.zero_grad()
        # No name for the logits: 16 MiB that outlive the step would cost this loop 3% of its speed.
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return speeds(steps * config.train.batch * context, began, clocks())


def main() -> int:
    """Prints one line and returns 0 where the target is met."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    options = {"name": "adamw", "lr": 6e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
    train = {"steps": 10 * arguments.steps, "validate_every": 0, "schedule": "cosine"}
    config = validate(Config, {"workload": "llm", "optimizer": options, "train": train}, "bench")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PISTE_HOME"] = folder
        llm.prepare_data(config)
        bare(config, 5)  # warm: libraries loaded, text in the page cache
        measured: list[dict[str, tuple[float, float]]] = []
        for pair in range(arguments.pairs):
            found: dict[str, tuple[float, float]] = {}
            for name in ("ours", "bare") if pair % 2 else ("bare", "ours"):
                if name == "ours":
                    found[name] = ours(config, arguments.steps, Path(folder) / f"run-{pair}")
                else:
                    found[name] = bare(config, arguments.steps)
            measured.append(found)
            print(
                f"  pair {pair}: ours {found['ours'][0]:.0f} bare {found['bare'][0]:.0f} tokens/s  ratio "
                f"{found['ours'][0] / found['bare'][0]:.3f} (CPU {found['ours'][1] / found['bare'][1]:.3f})"
            )
    ratio, cpu_ratio = (
        statistics.median(pair["ours"][clock] / pair["bare"][clock] for pair in measured) for clock in (0, 1)
    )
    ours_median, bare_median = (
        statistics.median(pair[name][0] for pair in measured) for name in ("ours", "bare")
    )
    verdict = "PASS" if ratio >= TARGET else "MISS"
    print(
        f"training_loop  ours {ours_median:.0f} tokens/s  bare {bare_median:.0f} tokens/s  "
        f"ratio {ratio:.3f} (CPU {cpu_ratio:.3f})  target {TARGET}  {verdict}"
    )
    return 0 if verdict == "PASS" else 1


if __name__ == "__main__":
    raise SystemExit(main())
