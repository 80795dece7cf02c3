"""What a person sees of a sweep while it computes, at several states."""

from __future__ import annotations

import io
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.platform.driving import write

from piste.ledger import open_ledger
from piste.schedule import Counts
from piste.space import Sweep
from piste.sweep_reporting import SweepJsonLines, SweepProgress, _live, draw_all, duration, edges, tables
from piste.sweeping import SweepResult, sweep
from piste.trials import Trial

pytest_plugins = ["tests.platform.fixtures"]

RECIPE = """workload = "quadratic"
[problem]
steps = 6
[tracking]
system_metrics = false
[sweep]
metric = "train/loss"
trials = 24
target = 0.5
[sweep.space]
"optimizer.name" = { choice = ["sgd", "adamw"] }
"optimizer.lr" = { log_uniform = [1e-2, 1.0] }
"""


def view(counts: Counts, name: str = "llm-reg-sweep-1a2b3c", width: int = 80) -> list[str]:
    section = Sweep.model_validate({"metric": "valid/loss", "trials": 1})
    stream = io.StringIO()
    Console(file=stream, width=width).print(_live(name, section, counts))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def counts(elapsed: float = 95.0, best: dict[str, Any] | None = None, **given: Any) -> Counts:
    """Counts of a session that began so many seconds ago."""
    trial = None if best is None else Trial(1, 1, 0, best, None, "run", value=3.123456)
    return Counts(started=time.monotonic() - elapsed, best=trial, **given)


def test_before_anything_has_ended() -> None:
    first, second, third = view(counts(0.0, total=36, running=2))
    assert first.split() == ["llm-reg-sweep-1a2b3c", "0/36", "0:00"]
    assert (second, third) == ("  2 running, 0 finished", "  no trial has finished yet")


def test_half_way_with_an_eta_and_the_best() -> None:
    best = {"optimizer.name": "adamw", "optimizer.lr": 0.0031234567}
    first, second, third = view(counts(total=36, finished=3, running=2, fresh=3, best=best))
    # 33 trials are left, at 95 / 3 seconds each
    assert first.split()[0::2] == ["llm-reg-sweep-1a2b3c", "3/36", "ETA"]
    assert first.split()[3::2] == ["1:35", "17:25"]
    assert second == "  2 running, 3 finished"
    assert third == "  best valid/loss 3.123 at optimizer adamw, lr 0.003123"


def test_what_went_otherwise_is_counted() -> None:
    lines = view(counts(9500.0, total=100_000, finished=93_000, pruned=4_000, failed=123, reused=2_000,
                        running=16, fresh=95_123, best={}))  # fmt: skip
    assert lines[0].split()[-4:] == ["97123/100000", "2:38:20", "ETA", "4:47"]
    assert lines[1] == "  16 running, 93000 finished, 4000 pruned, 123 failed, 2000 reused"
    assert lines[2] == "  best valid/loss 3.123"


def test_a_sweep_without_an_end_has_no_eta() -> None:
    first, *_ = view(counts(finished=3, running=1, fresh=3, best={}))
    assert "ETA" not in first
    assert first.split()[-2:] == ["3", "1:35"]


def test_a_session_that_has_computed_nothing_has_no_eta() -> None:
    assert "ETA" not in view(counts(total=12, finished=6, reused=6, best={}))[0]


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_name_and_many_values_break_no_line(width: int) -> None:
    name = "a-recipe-with-a-rather-long-name-indeed-sweep-1a2b3c"
    best = {f"model.part_{place}": 0.123456 for place in range(9)}
    lines = view(counts(total=100_000, finished=50_000, running=8, fresh=9, best=best), name, width)
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("a-recipe-with-a-rather-lo")
    assert "50000/100000" in lines[0]
    assert " ".join(lines[2:]).count("0.1235") == 9


@pytest.mark.parametrize(
    ("seconds", "clock"),
    [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.7, "1:00:00"), (86400 + 3661, "25:01:01")],
)
def test_durations_are_clocks(seconds: float, clock: str) -> None:
    assert duration(seconds) == clock


def run(folder: Path, text: str = RECIPE, **given: Any) -> SweepResult:
    return sweep(write(folder / "q.toml", text), local=True, **given)


def test_the_view_is_drawn_while_a_sweep_runs_and_gone_afterwards(tmp_path: Path, no_view: None) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    done = run(tmp_path, observer=SweepProgress(console))
    drawn = stream.getvalue()
    assert done.id in drawn
    assert drawn[drawn.rindex("24/24") :].count("\x1b[2K") == 3  # its three lines are erased


def test_each_line_is_where_the_sweep_stands(tmp_path: Path, no_view: None) -> None:
    stream = io.StringIO()
    done = run(tmp_path, observer=SweepJsonLines(stream), sweep__pack=False)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["started", "ended"] * 24
    assert [line["running"] for line in lines] == [1, 0] * 24
    ended = lines[1::2]
    assert [line["finished"] for line in ended] == list(range(1, 25))
    assert [(line["trial"], line["objective"]) for line in ended] == [
        (t.number, t.value) for t in done.trials
    ]
    best = list(itertools.accumulate((t.value or 0.0 for t in done.trials), min))
    assert [line["best"] for line in ended] == best
    assert {line["sweep"] for line in lines} == {done.id}


def test_every_picture_that_the_trials_allow_is_drawn(tmp_path: Path, no_view: None) -> None:
    done = run(tmp_path)
    made = draw_all(open_ledger(), done.trials, done.section, tmp_path)
    assert [path.name for path in made] == [
        f"{name}.png"
        for name in ("parallel-coordinates", "parameters", "importances", "best-so-far", "time-to-target")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    assert edges(open_ledger(), done.trials, done.section) == []


def test_tables_are_of_what_is_compared(tmp_path: Path, no_view: None) -> None:
    done = run(tmp_path)
    whole, shown = tables(open_ledger(), done.trials, done.section)
    least = min(group["cells"] for group in whole["groups"])
    assert sum(group["cells"] for group in whole["groups"]) == 24 > 2 * least
    assert len(whole["cells"]) == 20
    assert len(shown) == 3
    equal, _ = tables(open_ledger(), done.trials, done.section, "cells")
    assert [group["cells"] for group in equal["groups"]] == [least, least]
    assert tables(open_ledger(), [], done.section) == ({"cells": [], "groups": []}, [])
