"""What a dry run foretells, against what the sweep then does."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.platform.driving import write

import piste
from piste.dry_run import DryRun, dry_run
from piste.ledger import Row, metric_columns, open_ledger
from piste.preflight import cpus
from piste.sweep_reporting import print_dry_run
from piste.sweeping import sweep

pytest_plugins = ["tests.platform.fixtures"]

RECIPE = """workload = "quadratic"
[problem]
steps = 4
[resources]
workers = 2
[tracking]
system_metrics = false
[sweep]
metric = "train/loss"
trials = 12
batch = 2
[sweep.space]
"optimizer.name" = { grid = ["sgd", "adamw"] }
"optimizer.lr" = { log_uniform = [1e-2, 1.0] }
"optimizer.betas" = { choice = [[0.9, 0.95], [0.8, 0.9]], when = { "optimizer.name" = "adamw" } }
"resources.workers" = 1
"problem.steps" = 6
seed = { repeats = 3 }
"""


@pytest.fixture
def recipe(tmp_path: Path, no_view: None) -> Path:
    return write(tmp_path / "q.toml", RECIPE)


def foretold(recipe: Path, fresh: bool = False, local: bool = True, **fields: Any) -> DryRun:
    config = piste.load_recipe(recipe, {key.replace("__", "."): value for key, value in fields.items()})
    return dry_run(open_ledger(), "q", config, local=local, fresh=fresh)


def test_the_trials_foretold_are_those_that_are_run(recipe: Path, piste_home: Path) -> None:
    before = foretold(recipe)
    assert (len(before.compute), before.reused, before.unfit, before.later) == (12, (), (), 0)
    assert (before.seconds, before.total) == (None, None)
    assert before.basis == "no finished run of quadratic is in the ledger"
    assert open_ledger().runs() == []
    assert open_ledger().sweeps.newest() == []
    assert not list(piste_home.glob("sweeps/*"))
    done = sweep(recipe, local=True)
    assert [(t.number, t.cell, t.seed) for t in done.trials] == [
        (p.trial.number, p.trial.cell, p.trial.seed) for p in before.compute
    ]
    for trial, planned in zip(done.trials, before.compute, strict=True):
        assert json.dumps(trial.values) == json.dumps(planned.trial.values)
        assert open_ledger().run(trial.run_id).identity == planned.run["identity"]
    runs = len(open_ledger().runs())
    after = foretold(recipe)
    assert [(p.trial.number, run) for p, run in after.reused] == [(t.number, t.run_id) for t in done.trials]
    assert (after.compute, after.total) == ((), 0.0)
    assert len(open_ledger().runs()) == runs
    again = foretold(recipe, fresh=True)
    assert (len(again.compute), again.reused) == (12, ())
    longer = foretold(recipe, sweep__trials=18)
    assert [p.trial.number for p in longer.compute] == [12, 13, 14, 15, 16, 17]
    assert len(longer.reused) == 12
    assert sweep(recipe, local=True).trials[0].reused


def test_what_depends_on_results_is_counted_alone(recipe: Path) -> None:
    for searcher, now in (("tpe", 12), ("random", 30)):
        plan = foretold(recipe, sweep__searcher=searcher, sweep__trials=30)
        assert (len(plan.compute), plan.later) == (now, 30 - now)
    space = {"optimizer.lr": {"uniform": [0.1, 4.0]}, "problem.condition": {"grid": [2, 3]}}
    edge = {"metric": "train/loss", "searcher": "bisect", "bisect": {"parameter": "optimizer.lr"}}
    plan = foretold(recipe, sweep=edge | {"space": space})
    assert [(p.trial.cell, p.trial.values["optimizer.lr"]) for p in plan.compute] == [
        (0, 0.1), (1, 0.1), (2, 4.0), (3, 4.0),
    ]  # fmt: skip
    assert plan.later is None


def test_the_estimate_is_of_the_steps_that_the_trials_take(recipe: Path) -> None:
    done = sweep(recipe, local=True, sweep__trials=6)
    whole = foretold(recipe, fresh=True)
    assert whole.basis == "the median of 6 runs of quadratic"
    assert whole.seconds == pytest.approx(statistics.median(trial.seconds for trial in done.trials))
    rows = [
        metric_columns(
            trial.run_id, Row("time/step_ms", step, 9000.0 if step == 1 else 40.0 + 10.0 * place, 0)
        )
        for place, trial in enumerate(done.trials)
        for step in (1, 2, 3)
    ]
    open_ledger().sweeps.record([], [], rows)
    plan = foretold(recipe, fresh=True, sweep__searcher="tpe", sweep__trials=30)
    # medians of the runs are 40, 50, .. 90 ms, their median 65 ms; the space says 6 steps, the recipe 4
    assert plan.basis == "6 steps x 65 ms, the median of 6 runs"
    assert plan.seconds == pytest.approx(6 * 0.065)
    assert (len(plan.compute), plan.later) == (12, 18)
    assert plan.total == pytest.approx(30 * 6 * 0.065)
    grid = {"searcher": "grid", "metric": "train/loss", "space": {"problem.steps": {"grid": [2, 4, 12]}}}
    assert foretold(recipe, sweep=grid).total == pytest.approx((2 + 4 + 12) * 0.065)


def test_how_many_run_at_a_time(recipe: Path) -> None:
    assert foretold(recipe).at_a_time == 1
    assert foretold(recipe, local=False).at_a_time == cpus()  # the space asks for one worker, not two
    assert foretold(recipe, local=False, sweep__concurrency=3).at_a_time == 3


LLM = """workload = "llm"
[model]
layers = 1
heads = 2
width = 16
context = 16
[data]
source = "file"
path = "{text}"
vocab_size = 256
[train]
batch = 2
[sweep]
metric = "valid/loss"
searcher = "grid"
[sweep.space]
"train.steps" = { grid = [8, 4] }
"train.warmup_steps" = { grid = [1, 5] }
"""


def test_values_that_do_not_fit_together_are_no_cost(
    tmp_path: Path, piste_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write(tmp_path / "text.txt", "In the beginning was the word.\n" * 40)
    plan = foretold(write(tmp_path / "llm.toml", LLM.replace("{text}", str(text))))
    assert [p.trial.number for p in plan.compute] == [0, 1, 2]
    [unfit] = plan.unfit
    assert unfit.trial.values == {"train.steps": 4, "train.warmup_steps": 5}
    print_dry_run(plan, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert [trial["do"] for trial in printed["trials"]] == ["compute"] * 3 + ["fail"]
    assert "warmup_steps = 5 must be below steps = 4" in printed["trials"][3]["error"]
    print_dry_run(plan, as_json=False)
    assert "3 trials to compute, 0 reused, 1 fail" in capsys.readouterr().out


def test_what_is_printed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(recipe, local=True, sweep__trials=6)
    plan = foretold(recipe, local=False, sweep__searcher="tpe", sweep__batch=1, sweep__concurrency=2)
    plan = replace(plan, seconds=100.0, basis="measured")
    print_dry_run(plan, as_json=False)
    *_, count, cost = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert count == "6 trials to compute and 6 that depend on their results, 0 reused"
    assert cost == "about 10:00 with 2 at a time: 100 s each (measured)"
    print_dry_run(plan, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["later"], printed["seconds_each"], printed["seconds"], printed["at_a_time"]) == (
        6, 100.0, 1200.0, 2,
    )  # fmt: skip
    assert printed["trials"][3]["values"] == json.loads(json.dumps(plan.compute[3].trial.values))

    plan = foretold(recipe)
    print_dry_run(plan, as_json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["trial", "optimizer", "lr", "betas", "seed"]
    for line, (planned, run) in zip(lines[1:7], plan.reused, strict=True):
        assert (int(line[0]), line[1]) == (planned.trial.number, planned.trial.values["optimizer.name"])
        assert line[-2:] == ["reuses", run]
    assert lines[13] == ["6", "trials", "to", "compute,", "6", "reused"]

    table = {"parameter": "optimizer.lr"}
    edge = {"metric": "train/loss", "searcher": "bisect", "bisect": table}
    space = {"optimizer.lr": {"uniform": [0.1, 4.0]}}
    print_dry_run(foretold(recipe, sweep=edge | {"space": space}), as_json=False)
    assert "2 trials to compute and those that its results ask for, 0 reused" in capsys.readouterr().out
    grid = {"metric": "train/loss", "searcher": "grid", "space": {"problem.steps": {"int": [1, 60]}}}
    print_dry_run(foretold(recipe, sweep=grid), as_json=False)
    out = capsys.readouterr().out
    assert "... and 10 more" in out
    assert len(out.splitlines()) == 1 + 50 + 3


def test_text_in_brackets_is_text(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"metric": "train/loss", "searcher": "grid"}
    space = {"tracking.experiment": {"grid": ["[bold]", "[/red]"]}}
    print_dry_run(foretold(recipe, sweep=grid | {"space": space}), as_json=False)
    out = capsys.readouterr().out
    assert "[bold]" in out
    assert "[/red]" in out
