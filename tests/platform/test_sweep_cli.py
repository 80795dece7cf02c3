"""`piste sweep` and `piste compare --sweep`: what they refuse, print, leave behind and continue."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.platform.driving import PACED, end, ledger_of, start_piste, steps_taken, wait_until, write

from piste.cli import main
from piste.ledger import TrialRecord, open_ledger
from piste.sweeping import sweep

pytest_plugins = ["tests.platform.fixtures"]

QUADRATIC = """workload = "quadratic"
[problem]
steps = 6
[tracking]
system_metrics = false
"""
SWEEP = f"""{QUADRATIC}
[sweep]
metric = "train/loss"
trials = 12
batch = 2
[sweep.space]
"optimizer.name" = {{ grid = ["sgd", "adamw"] }}
"optimizer.lr" = {{ log_uniform = [1e-2, 1.0] }}
seed = {{ repeats = 3 }}
"""
# What a checkpoint is called does not change a run.
SAME = f"""{QUADRATIC}
[sweep]
metric = "train/loss"
searcher = "grid"
[sweep.space]
"checkpoints.keep" = {{ grid = ["last 2", "all"] }}
seed = {{ repeats = 3 }}
"""
EDGE = f"""{QUADRATIC}
[sweep]
metric = "train/loss"
searcher = "bisect"
[sweep.bisect]
parameter = "optimizer.lr"
tolerance = 0.05
[sweep.space]
"optimizer.lr" = {{ log_uniform = [0.1, 100.0] }}
seed = {{ repeats = 3 }}
"""


# The optimizer is drawn, so that one is tuned more than the other.
TUNED = (
    SWEEP.replace("grid", "choice")
    .replace("trials = 12", "trials = 15")
    .replace("repeats = 3", "repeats = 1")
)


@pytest.fixture
def files(tmp_path: Path, piste_home: Path) -> dict[str, Path]:
    texts = {"q": SWEEP, "same": SAME, "tuned": TUNED, "edge": EDGE, "plain": QUADRATIC}
    return {name: write(tmp_path / f"{name}.toml", text) for name, text in texts.items()}


@pytest.fixture
def command(
    files: dict[str, Path], no_view: None, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    def run(*arguments: str) -> tuple[str, str]:
        assert main([word.format(**files) for word in arguments]) == 0
        out, err = capsys.readouterr()
        return out, err

    return run


def newest() -> str:
    return open_ledger().sweeps.newest()[0].id


def outcomes(sweep_id: str) -> list[tuple[Any, ...]]:
    """What resume must not change."""
    return [same(trial) for trial in open_ledger().sweeps.trials(sweep_id)]


def same(trial: TrialRecord) -> tuple[Any, ...]:
    values = json.dumps(trial.values, sort_keys=True)
    return trial.number, trial.cell, trial.seed, values, trial.outcome, trial.value, trial.step


# -- what is refused


BAD_INPUT = {
    "nothing": ("sweep", ["name a recipe, or a sweep with --resume"]),
    "both": ("sweep {q} --resume q-sweep-1", ["name a recipe, or a sweep with --resume"]),
    "extend what": ("sweep {q} --extend 3", ["--extend goes with --resume SWEEP"]),
    "dry resume": ("sweep --resume q-sweep-1 --dry-run", ["--dry-run goes with a recipe, not with --resume"]),
    "fewer": ("sweep --resume q-sweep-1 --extend -3", ["--extend -3", "never gets fewer trials"]),
    "unknown sweep": ("sweep --resume q-sweep-1", ["no sweep has id 'q-sweep-1'", "piste ls sweeps"]),
    "no sweep": ("sweep {plain} --local", ["plain: no [sweep]", "`piste run plain`"]),
    "no dry sweep": ("sweep {plain} --dry-run", ["plain: no [sweep]"]),
    "unknown recipe": ("sweep no-such-recipe --local", ["unknown recipe 'no-such-recipe'"]),
    "unknown key": ("sweep {q} --local --sweep.trails 6", ["'sweep.trails'", "did you mean 'trials'?"]),
    "trials": ("sweep {q} --local --sweep.trials 7", ["trials = 7", "3 seeds x 2 grid points", "6 or 12"]),
    "searcher": ("sweep {q} --local --sweep.searcher bayes", ["sweep.searcher", "given: 'bayes'"]),
    "not in the recipe": (
        "sweep {q} --local --sweep.space {{'optimizer.lrr'={{choice=[1]}}}} --sweep.trials 3",
        ["sgd takes no 'lrr'", "did you mean 'lr'?", "(at optimizer.lrr = 1)"],
    ),
    "unknown field": (
        "sweep {q} --local --sweep.space {{'problem.stepz'={{int=[1,3]}}}} --sweep.trials 3",
        ["unknown key 'problem.stepz'", "did you mean 'steps'?", "(at problem.stepz = "],
    ),
    "unfit value": (
        "sweep {q} --local --sweep.space {{'optimizer.name'={{grid=['sgd','muonn']}}}} --sweep.trials 6",
        ["'muonn'", "did you mean 'muon'?", "(at optimizer.name = muonn)"],
    ),
    "dead tracking": (
        "sweep {q} --local --tracking.uri http://127.0.0.1:9",
        ["http://127.0.0.1:9: nothing answers"],
    ),
    "compare what": ("compare", ["name runs, or a sweep with --sweep"]),
    "compare both": ("compare q-1 --sweep q-sweep-1", ["name runs, or a sweep with --sweep"]),
    "compare unknown": ("compare --sweep q-sweep-1", ["no sweep has id 'q-sweep-1'"]),
}


@pytest.mark.parametrize(("words", "parts"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_code_2(
    words: str, parts: list[str], files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([word.format(**files) for word in words.split()])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("piste: ")
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err
    assert open_ledger().sweeps.newest() == []


# -- what is printed


def test_a_sweep_prints_its_best_cells_and_where_to_look(
    command: Callable[..., tuple[str, str]], piste_home: Path
) -> None:
    out, err = command("sweep", "{q}", "--local")
    sweep_id = newest()
    assert re.match(rf"sweep {sweep_id}\n", err)
    trials = open_ledger().sweeps.trials(sweep_id)
    assert [trial.outcome for trial in trials] == ["finished"] * 12
    lines = [line.split() for line in out.splitlines()]
    assert lines[1][:4] == ["optimizer", "lr", "n", "mean"]
    best = min({t.cell for t in trials}, key=lambda c: sum(t.value or 0.0 for t in trials if t.cell == c))
    first = next(trial for trial in trials if trial.cell == best)
    mean = sum(trial.value or 0.0 for trial in trials if trial.cell == best) / 3
    assert lines[2][:4] == [
        first.values["optimizer.name"], f"{first.values['optimizer.lr']:.4g}", "3", f"{mean:.4g}",
    ]  # fmt: skip
    assert "open MLflow   piste ui   # http://" in out
    pictures = list((piste_home / "pictures" / sweep_id).glob("*.png"))
    assert {"best-so-far.png", "parallel-coordinates.png"} <= {picture.name for picture in pictures}
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    listed, _ = command("ls", "sweeps")
    [line] = [line for line in listed.splitlines() if sweep_id in line]
    assert "finished" in line
    assert "12 of 12 trials" in line


@pytest.mark.parametrize("pack", ["true", "false"])
def test_json_lines_add_up(command: Callable[..., tuple[str, str]], pack: str) -> None:
    command("sweep", "{q}", "--local", "--sweep.trials", "6")
    out, _ = command("sweep", "{q}", "--local", "--json", "--sweep.pack", pack)
    *progress, last = (json.loads(line, parse_constant=_no_constant) for line in out.splitlines())
    assert (last["sweep"], last["status"], last["reason"]) == (newest(), "finished", None)
    started = [line for line in progress if line["event"] == "started"]
    ended = [line for line in progress if line["event"] == "ended"]
    assert sum(line.get("trials", 1) for line in started) == sum(line.get("trials", 1) for line in ended) == 6
    for before, line in zip([None, *progress], progress, strict=False):
        done = line["finished"] + line["pruned"] + line["failed"]
        assert done + line["running"] <= line["total"] == 12
        assert line["reused"] <= 6
        assert before is None or done >= before["finished"] + before["pruned"] + before["failed"]
    assert (progress[-1]["finished"], progress[-1]["running"], progress[-1]["reused"]) == (12, 0, 6)
    assert progress[-1]["eta"] == 0.0
    values = [trial.value for trial in open_ledger().sweeps.trials(newest()) if trial.value is not None]
    assert progress[-1]["best"] == min(values)
    assert sum(cell["n"] for cell in last["cells"]) == 12
    if pack == "false":
        assert {line["trial"] for line in ended} == set(range(6, 12))
        by_number = {trial.number: trial for trial in open_ledger().sweeps.trials(newest())}
        for line in ended:
            trial = by_number[line["trial"]]
            assert (line["run"], line["objective"], line["outcome"], line["seed"], line["values"]) == (
                trial.run_id, trial.value, trial.outcome, trial.seed, trial.values,
            )  # fmt: skip


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_json_has_no_infinity_where_trials_diverge(command: Callable[..., tuple[str, str]]) -> None:
    space = "{'optimizer.lr'={grid=[0.5,1e300]}}"
    out, _ = command(
        "sweep", "{q}", "--local", "--json", "--sweep.pack", "false", "--sweep.trials", "2",
        "--sweep.space", space.replace("{", "{{").replace("}", "}}"),
    )  # fmt: skip
    *progress, last = (json.loads(line, parse_constant=_no_constant) for line in out.splitlines())
    assert [
        (line["outcome"], line["objective"] is None) for line in progress if line["event"] == "ended"
    ] == [
        ("finished", False),
        ("failed", True),
    ]
    assert last["cells"][1]["failed"] == 1


def test_a_dry_run_runs_nothing(command: Callable[..., tuple[str, str]], piste_home: Path) -> None:
    out, err = command("sweep", "{q}", "--dry-run")
    assert err == ""
    assert "12 trials to compute, 0 reused" in out
    plan = json.loads(command("sweep", "{q}", "--dry-run", "--json", "--local")[0])
    assert [trial["trial"] for trial in plan["trials"]] == list(range(12))
    assert (open_ledger().sweeps.newest(), open_ledger().runs()) == ([], [])
    command("sweep", "{q}", "--local")
    assert "0 trials to compute, 12 reused" in command("sweep", "{q}", "--dry-run", "--local")[0]


def test_what_makes_no_difference_is_said_to_make_none(command: Callable[..., tuple[str, str]]) -> None:
    out, _ = command("sweep", "{same}", "--local")
    assert "no difference found at n=3" in " ".join(out.split())
    report = json.loads(command("compare", "--sweep", newest(), "--json")[0])
    assert [cell["verdict"] for cell in report["cells"]] == ["best", "no difference found at n=3"]


def test_an_edge_is_found_where_the_closed_form_has_it(command: Callable[..., tuple[str, str]]) -> None:
    """Gradient descent on a bowl whose largest eigenvalue is 1 converges below lr = 2, and nowhere above."""
    out, _ = command("sweep", "{edge}", "--local", "--problem.steps", "200", "--json")
    [found] = json.loads(out.splitlines()[-1])["thresholds"]
    low, high = found["bracket"]
    assert low < 2.0 < high
    assert (high - low) / high <= 0.05
    # each probe halves log(100 / 0.1)
    assert len(found["probes"]) == 2 + math.ceil(math.log2(math.log(1000.0) / -math.log1p(-0.05)))
    assert len(open_ledger().sweeps.trials(newest())) == 3 * len(found["probes"])
    shown, _ = command("compare", "--sweep", newest())
    assert "3 of 3" in shown
    assert "0 of 3" in shown


def test_compare_can_be_held_to_equal_budgets(command: Callable[..., tuple[str, str]]) -> None:
    command("sweep", "{tuned}", "--local")
    trials = open_ledger().sweeps.trials(newest())
    cells = [sum(t.values["optimizer.name"] == name for t in trials) for name in ("sgd", "adamw")]
    assert cells[0] != cells[1]  # a choice is drawn, not dealt

    def groups(*options: str) -> dict[str, int]:
        report = json.loads(command("compare", "--sweep", newest(), "--json", *options)[0])
        return {group["group"]: group["cells"] for group in report["groups"]}

    assert groups() == {"sgd": cells[0], "adamw": cells[1]}
    assert (
        groups("--equal-budgets") == groups("--equal-budgets", "cells") == dict.fromkeys(groups(), min(cells))
    )
    seconds = groups("--equal-budgets", "seconds")
    assert all(seconds[name] <= count for name, count in groups().items())
    note = f"--equal-budgets compares {min(cells)} each"
    assert note in command("compare", "--sweep", newest())[0]
    assert note not in command("compare", "--sweep", newest(), "--equal-budgets")[0]


# -- what is continued


def test_a_finished_sweep_is_extended_as_if_it_had_been_longer(
    command: Callable[..., tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    command("sweep", "{q}", "--local", "--sweep.searcher", "tpe")
    sweep_id = newest()
    assert main(["sweep", "--resume", sweep_id, "--local"]) == 2
    line = capsys.readouterr().err
    assert (
        line == f"piste: {sweep_id} has finished: `piste sweep --resume {sweep_id} --extend N` adds trials\n"
    )
    assert main(["sweep", "--resume", sweep_id, "--local", "--extend", "5"]) == 2
    assert "trials = 17 is no multiple of 3 seeds x 2 grid points" in capsys.readouterr().err
    first = outcomes(sweep_id)
    command("sweep", "--resume", sweep_id[:-1], "--local", "--extend", "6")
    assert outcomes(sweep_id)[:12] == first
    assert "18 of 18 trials" in command("ls", "sweeps")[0]
    whole = sweep(open_ledger_path(sweep_id), local=True, fresh=True, sweep__trials=18)
    assert [same(trial) for trial in whole.trials] == outcomes(sweep_id)


def open_ledger_path(sweep_id: str) -> Path:
    """The recipe that a sweep keeps in its folder."""
    return Path(open_ledger().sweeps.get(sweep_id).directory) / "recipe.toml"


PACES = f"""workload = "{PACED}"
[pace]
steps = 12
records = "{{records}}"
[tracking]
system_metrics = false
[sweep]
metric = "train/loss"
searcher = "tpe"
trials = 12
batch = 2
[sweep.space]
"optimizer.lr" = {{{{ log_uniform = [1e-3, 0.5] }}}}
"pace.hold_at" = {{{{ int = [7, 40] }}}}
seed = {{{{ repeats = 2 }}}}
"""


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_sweep_that_is_cut_off_is_resumed_to_the_same_trials(
    how: signal.Signals,
    shown_home: Path,
    tmp_path: Path,
    no_view: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Some trials wait for the file `go` at a step of theirs; the process is cut off while one does."""
    recipe = write(tmp_path / "paces.toml", PACES.format(records=tmp_path))
    process = start_piste(shown_home, "sweep", recipe, "--local")
    wait_until(lambda: held(shown_home, tmp_path), "a trial waits")
    process.send_signal(how)
    code, _, err = end(process)
    [cut] = ledger_of(shown_home).sweeps.newest()
    before = ledger_of(shown_home).sweeps.trials(cut.id)
    assert 0 < sum(trial.outcome == "finished" for trial in before) < 12
    resume = ["sweep", "--resume", cut.id, "--local"]
    if how == signal.SIGINT:
        assert (code, cut.status) == (130, "interrupted")
        assert f"piste: interrupted; `piste {' '.join(resume)}` continues it" in err.splitlines()
        assert "Traceback" not in err
    else:
        assert (code, cut.status) == (-signal.SIGKILL, "running")
    taken = len(steps_taken(tmp_path))
    write(tmp_path / "go", "")
    assert main(resume) == 0
    again = outcomes(cut.id)
    assert again[: len(before) - 2] == [same(trial) for trial in before[:-2]]
    # twelve trials of twelve steps; what was cut off goes on from its checkpoint of step 5 or 10
    assert len(steps_taken(tmp_path)) == 12 * 12 + taken % 12 - (taken % 12 - 1) // 5 * 5
    ledger = open_ledger()
    for trial in ledger.sweeps.trials(cut.id):
        assert [step for step, _ in ledger.history(trial.run_id, "train/loss")] == list(range(1, 13))

    monkeypatch.setenv("PISTE_HOME", str(tmp_path / "undisturbed"))
    assert [same(trial) for trial in sweep(recipe, local=True).trials] == again


def held(home: Path, records: Path) -> bool:
    """Whether the last step that was taken is one at which its trial waits."""
    steps = steps_taken(records)
    if not steps or not (home / "ledger.db").exists():
        return False
    ledger = ledger_of(home)
    trials = [trial for sweep in ledger.sweeps.newest() for trial in ledger.sweeps.trials(sweep.id)]
    waiting = {trial.values["pace.hold_at"] for trial in trials if trial.outcome is None}
    return len(steps) % 12 != 0 and waiting == {steps[-1][0]}


def test_finished_trials_are_trained_longer_and_no_step_is_taken_twice(
    command: Callable[..., tuple[str, str]],
) -> None:
    command("sweep", "{q}", "--local", "--json", "--sweep.pack", "false")
    before = open_ledger().sweeps.trials(newest())
    command("sweep", "--resume", newest(), "--problem.steps", "9", "--local", "--json")
    after = open_ledger().sweeps.trials(newest())
    assert [t.number for t in after] == [t.number for t in before]
    for short, long in zip(before, after, strict=True):
        assert (short.step, long.step, long.outcome) == (7, 10, "finished")
        assert short.run_id == long.run_id
        history = open_ledger().history(long.run_id, "train/loss")
        assert [step for step, _ in history] == list(range(1, 11))
        assert dict(history)[7] == short.value  # what it had computed stays
