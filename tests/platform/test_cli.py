"""The command: bad input in one line, and what it prints when all is well."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tests.platform.driving import environment, write

import piste
from piste.cli import main
from piste.errors import BadInput
from piste.ledger import open_ledger
from piste.reporting import ProgressBar

pytest_plugins = ["tests.platform.fixtures"]

QUADRATIC = """workload = "quadratic"
[problem]
steps = 6
[tracking]
system_metrics = false
"""
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
steps = 2
batch = 2
warmup_steps = 1
validation_batches = 1
samples = 0
[tracking]
system_metrics = false
"""


@pytest.fixture
def files(tmp_path: Path, piste_home: Path) -> dict[str, Path]:
    text = write(tmp_path / "text.txt", "In the beginning was the word.\n" * 40)
    return {
        "q": write(tmp_path / "q.toml", QUADRATIC),
        "llm": write(tmp_path / "llm.toml", LLM.replace("{text}", str(text))),
        "misspelt": write(tmp_path / "misspelt.toml", 'workload = "quadratik"'),
        "nameless": write(tmp_path / "nameless.toml", "seed = 1"),
        "broken": write(tmp_path / "broken.toml", "workload = "),
        "folder": tmp_path,
    }


def one_line(err: str) -> str:
    assert "Traceback" not in err
    assert err.startswith("piste: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


BAD_INPUT = {
    "unknown key": ("run {q} --problem.stepz 3", ["problem.stepz", "did you mean 'steps'?"]),
    "unknown section": ("run {q} --problm.steps 3", ["'problm'", "did you mean 'problem'?"]),
    "value as section": ("run {q} --workload.steps 3", ["'workload' is a value"]),
    "wrong type": ("run {q} --problem.steps many", ["problem.steps", "integer", "given: 'many'"]),
    "out of range": ("run {q} --problem.steps 0", ["problem.steps", "greater than or equal to 1"]),
    "no number": ("run {q} --problem.condition nan", ["problem.condition", "finite"]),
    "no workers": ("run {q} --resources.workers 0", ["resources.workers", "given: 0"]),
    "seed": ("run {q} --seed true", ["seed", "whole number"]),
    "policy": ("run {q} --checkpoints.keep some", ["keep = 'some'", '"last N"']),
    "a password": (
        "run {q} --tracking.uri http://me:hidden@host:5000",
        ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"],
    ),
    "no value": ("run {q} --problem.steps", ["--problem.steps needs a value"]),
    "missing file": ("run {folder}/none.toml", ["none.toml", "no such file"]),
    "folder": ("run {folder}", ["cannot be read"]),
    "not TOML": ("run {broken}", ["broken.toml", "not valid TOML"]),
    "no workload": ("run {nameless}", ["workload is missing"]),
    "unknown workload": ("run {misspelt}", ["'quadratik'", "did you mean 'quadratic'?"]),
    "unknown recipe": ("run no-such-recipe", ["unknown recipe 'no-such-recipe'"]),
    "unknown optimizer": ("run {q} --optimizer.name muonn", ["'muonn'", "did you mean 'muon'?"]),
    "no such module": ("run {q} --optimizer.name no_such.Thing", ["no module named 'no_such'"]),
    "unknown keyword": ("run {q} --optimizer.lrr 1", ["sgd takes no 'lrr'", "did you mean 'lr'?"]),
    "refused value": ("run {q} --optimizer.lr=-1", ["optimizer sgd", "-1"]),
    "too many workers": ("run {q} --resources.workers 4096", ["4096 workers x 1 CPUs = 4096 CPUs"]),
    "short text": ("run {llm} --local --model.context 5000", ["model.context = 5000", "5001"]),
    "no such text": ("run {llm} --local --data.path {folder}/none", ["none: no such file"]),
    "no checkpoint": ("run {llm} --local --init_from {folder}", ["init_from", "not a checkpoint's folder"]),
    "dead tracking": (
        "run {q} --local --tracking.uri http://127.0.0.1:9",
        ["http://127.0.0.1:9: nothing answers"],
    ),
    "odd tracking": ("run {q} --local --tracking.uri ftp://x", ["'ftp://x'", "sqlite:///FILE"]),
    "no option": ("ls runs --colour red", ["ls takes no --colour"]),
    "no flag": ("ls runs --json", ["ls takes no --json"]),
    "stray word": ("ls runs red", ["unexpected argument 'red'"]),
}


@pytest.mark.parametrize(("command", "parts"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_code_2(
    command: str,
    parts: list[str],
    files: dict[str, Path],
    piste_home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main([word.format(**files) for word in command.split()])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    for part in parts:
        assert part in one_line(err)
    assert not list(piste_home.glob("runs/*"))


def test_debug_shows_where(files: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="stepz"):
        main(["run", str(files["q"]), "--problem.stepz", "3", "--debug"])


@pytest.mark.parametrize("command", ["resume {id}", "rerun {id}", "call {id} sample", "compare {id}"])
def test_a_run_that_does_not_exist(
    command: str, piste_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.format(id="q-123456").split()) in {1, 2}
    line = one_line(capsys.readouterr().err)
    assert "no run has id 'q-123456'" in line
    assert "piste ls runs" in line


def test_a_home_that_cannot_be_written(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PISTE_HOME", str(files["q"] / "below"))  # below a regular file: also for root
    assert main(["run", str(files["q"]), "--local"]) == 1
    line = one_line(capsys.readouterr().err)
    assert "q.toml" in line
    assert "set PISTE_HOME" in line


def test_a_home_without_room_for_runs(
    files: dict[str, Path], piste_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(piste_home / "runs", "in the way")
    assert main(["run", str(files["q"]), "--local"]) == 2
    assert "set PISTE_HOME" in one_line(capsys.readouterr().err)
    assert open_ledger().runs() == []


def test_a_corrupt_ledger(
    files: dict[str, Path], piste_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(piste_home / "ledger.db", "no database " * 100)
    assert main(["run", str(files["q"]), "--local"]) == 1
    line = one_line(capsys.readouterr().err)
    assert "ledger.db" in line
    assert "not a database" in line


def test_a_ledger_url_of_no_database(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PISTE_LEDGER", "nonsense")
    assert main(["ls", "runs"]) == 1
    assert "nonsense" in one_line(capsys.readouterr().err)


def test_a_checkpoint_of_another_architecture(
    files: dict[str, Path], no_view: None, capsys: pytest.CaptureFixture[str]
) -> None:
    first = piste.run(files["llm"], local=True)
    arguments = ["--model.width", "32", "--init_from", str(first.artifacts["step-000000002"])]
    assert main(["run", str(files["llm"]), "--local", "--json", *arguments]) in {1, 2}
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("piste: ")
    assert "another architecture" in last
    assert "16) there" in last
    assert "32) here" in last


@pytest.mark.parametrize("debug", [False, True])
def test_a_failing_run_is_code_1(
    debug: bool, tmp_path: Path, no_view: None, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['workload = "tests.platform.paced"', "[pace]", f'records = "{tmp_path}"', "fail_at = 2"]
    recipe = write(tmp_path / "failing.toml", "\n".join(lines))
    arguments = ["run", str(recipe), "--local", "--json"]
    if debug:
        with pytest.raises(RuntimeError, match="on fire"):
            main([*arguments, "--debug"])
        return
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "the laboratory is on fire" in err.splitlines()[-1]
    [row] = open_ledger().runs()
    assert row.status == "failed"


def python(program: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment(home),
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )


IMPORTS = """import sys
from piste.cli import main
code = main(sys.argv[1:])
print("imported:", *sorted({"matplotlib", "mlflow", "ray", "sqlalchemy", "torch"} & set(sys.modules)))
sys.exit(code)
"""


def test_too_many_workers_are_refused_before_ray_is_imported(
    files: dict[str, Path], piste_home: Path
) -> None:
    done = python(IMPORTS, piste_home, "run", str(files["q"]), "--resources.workers", "4096")
    assert done.returncode == 2
    assert "but this machine has" in one_line(done.stderr)
    assert "ray" not in done.stdout.partition("imported:")[2].split()
    assert not piste_home.exists()


def test_ls_shows_all_kinds_and_imports_nothing_heavy(piste_home: Path) -> None:
    done = python(IMPORTS, piste_home, "ls")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1] == "imported:"
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")][:-1] == [
        "workloads",
        "optimizers",
        "recipes",
        "studies",
    ]
    summaries = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert summaries["quadratic"].startswith("A quadratic bowl with a known minimum")
    assert {"llm", "reg", "muon"} <= summaries.keys()


def test_show_prints_a_recipe_that_loads_back_equal(
    files: dict[str, Path], tmp_path: Path, piste_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, changes in (("q", {"seed": 3, "optimizer.lr": 0.25}), ("llm", {"model.width": 32})):
        arguments = [part for key, value in changes.items() for part in (f"--{key}", str(value))]
        assert main(["run", str(files[name]), *arguments, "--show"]) == 0
        shown = write(tmp_path / "shown.toml", capsys.readouterr().out)
        assert piste.load_recipe(shown) == piste.load_recipe(files[name], changes)
        assert piste.load_recipe(shown) != piste.load_recipe(files[name])
    assert not piste_home.exists()


@pytest.fixture
def command(files: dict[str, Path], no_view: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        assert main([word.format(**files) for word in arguments]) == 0
        return capsys.readouterr().out

    return run


def test_json_lines_parse(command: Callable[..., str]) -> None:
    *progress, last = [json.loads(line) for line in command("run", "{q}", "--local", "--json").splitlines()]
    [row] = last["runs"]
    assert (row["status"], row["optimizer"], row["seed"]) == ("finished", "sgd", 0)
    assert progress
    assert all(line.keys() == {"run", "step", "total", "metrics"} for line in progress)
    assert (progress[-1]["run"], progress[-1]["step"]) == (row["run"], 7)
    assert progress[-1]["metrics"]["train/loss"] == row["train/loss"]
    second = json.loads(command("rerun", row["run"], "--local", "--json").splitlines()[-1])
    assert (second["first"], second["differences"]) == (row["run"], {"train/loss": 0.0})


def test_a_log_says_nothing_twice(files: dict[str, Path]) -> None:
    written = io.StringIO()
    show = ProgressBar(Console(file=written))._lines("q-1", piste.load_recipe(files["q"]))
    for loss in (0.5, 0.5, 0.25):  # the last step's metrics may come in parts
        show(6, {"train/loss": loss})
    assert written.getvalue().splitlines() == [f"q-1 step 6/6 train/loss {loss}" for loss in (0.5, 0.25)]


def test_two_recipes_are_run_and_compared(command: Callable[..., str], piste_home: Path) -> None:
    out = command("run", "{q}", "{llm}", "--local", "--seed", "5")
    runs = open_ledger().runs()
    assert {(run.recipe, run.seed, run.status) for run in runs} == {
        ("q", 5, "finished"),
        ("llm", 5, "finished"),
    }
    assert all(run.id in out for run in runs)
    assert "open MLflow   piste ui" in out
    [picture] = piste_home.glob("pictures/*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.name in out
    listed = command("ls", "runs")
    assert all(run.id in listed for run in runs)


def test_rerun_says_that_nothing_differs(command: Callable[..., str]) -> None:
    command("run", "{q}", "--local")
    [first] = open_ledger().runs()
    out = command("rerun", first.id[:-1], "--local")  # the beginning of an id is enough
    assert f"repeats {first.id} bit for bit: 1 metrics, difference 0" in out
