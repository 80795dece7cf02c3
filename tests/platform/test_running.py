"""The life of a run: in this process, and as a process that is killed, interrupted, terminated."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update
from tests.platform.driving import (
    PACED,
    alive,
    assert_same_weights,
    descendants,
    done_again,
    end,
    final_weights,
    ledger_of,
    paced_recipe,
    start_piste,
    steps_taken,
    wait_until,
)
from tests.platform.paced import FAILURE, Config

import piste
from piste import running
from piste.checkpoints import CheckpointStore
from piste.config import Recipe
from piste.errors import BadInput, PisteError
from piste.home import home
from piste.ledger import Metric, open_ledger
from piste.provenance import identify
from piste.running import RunResult

pytest_plugins = ["tests.platform.fixtures"]

STEPS, EVERY = 20, 5


def paced(**overrides: Any) -> Recipe:
    return running.resolve({"workload": PACED, "tracking": {"system_metrics": False}, **overrides}, PACED)


def undisturbed(**overrides: Any) -> RunResult:
    return piste.run(paced(**overrides), local=True)


@pytest.mark.usefixtures("no_view")
class TestInProcess:
    def test_a_result_tells_what_a_run_has_come_to(self) -> None:
        result = undisturbed()
        assert result.status == "finished"
        losses = result.history("train/loss")
        assert [step for step, _ in losses] == list(range(1, STEPS + 1))
        assert result.metrics == {"train/loss": losses[-1][1]}
        assert list(result.artifacts) == ["step-000000015", "step-000000020"]  # keep = "last 2"
        assert all(path.is_dir() for path in result.artifacts.values())
        assert result.directory.parent.parent == home()
        stored = piste.load_recipe(result.directory / "recipe.toml")
        assert stored == paced()

    def test_a_recipe_file_with_overrides(self, tmp_path: Path) -> None:
        recipe = paced_recipe(tmp_path / "records", steps=3)
        result = piste.run(recipe, local=True, seed=7, optimizer__lr=0.2)
        row = open_ledger().run(result.id)
        assert (row.seed, row.recipe, row.config["optimizer"]["lr"]) == (7, "paced", 0.2)
        assert result.id.startswith("paced-")

    def test_a_failure_is_recorded_and_mended_by_resume(self, tmp_path: Path) -> None:
        pace = {"records": str(tmp_path), "fail_at": 12}
        with pytest.raises(RuntimeError, match=FAILURE):
            piste.run(paced(pace=pace), local=True)
        [row] = open_ledger().runs()
        assert (row.status, row.error) == ("failed", f"RuntimeError: {FAILURE}")
        assert "in _pace" in (Path(row.directory) / "error.txt").read_text()  # the traceback
        (tmp_path / "mended").touch()
        resumed = piste.resume(row.id, local=True)
        assert resumed.status == "finished"
        assert open_ledger().run(row.id).error is None
        assert [step for step, _ in steps_taken(tmp_path)] == [*range(1, 13), *range(11, STEPS + 1)]
        whole = undisturbed()
        assert resumed.history("train/loss") == whole.history("train/loss")
        assert_same_weights(whole.directory, resumed.directory)

    def test_a_finished_run_is_not_resumed(self) -> None:
        done = undisturbed()
        with pytest.raises(BadInput, match=f"piste rerun {done.id}"):
            piste.resume(done.id, local=True)
        assert open_ledger().run(done.id).attempt == 1

    def test_a_run_of_two_workers_is_not_taken_further_or_repeated_by_one(self) -> None:
        ledger = open_ledger()
        run_id = running.plan(ledger, "wide", paced(resources={"workers": 2}))
        for verb in (piste.resume, piste.rerun):
            with pytest.raises(BadInput, match="2 workers"):
                verb(run_id, local=True)
        assert [row.id for row in ledger.runs()] == [run_id]

    def test_a_run_of_a_living_driver_is_left_alone(self) -> None:
        ledger = open_ledger()
        run_id = running.plan(ledger, "busy", paced())
        ledger.claim(run_id, f"{os.uname().nodename}:1")  # process 1 is always alive
        ledger.begin_attempt(run_id)
        with pytest.raises(PisteError, match="process 1"):
            piste.resume(run_id, local=True)
        assert ledger.run(run_id).status == "running"

    def test_rerun_repeats_bit_for_bit_and_sees_a_planted_change(self) -> None:
        first = undisturbed()
        compared = piste.rerun(first.id, local=True)
        assert compared.second.id != first.id
        assert (compared.largest, compared.changed) == (0.0, ())
        assert set(compared.metrics) == {"train/loss"}
        ledger = open_ledger()
        planted = (Metric.run_id == first.id, Metric.step == 4)
        with ledger.engine.begin() as connection:
            connection.execute(update(Metric).where(*planted).values(value=Metric.value + 0.5))
        gap = running.difference(ledger, first.id, compared.second.id)["train/loss"]
        assert gap == pytest.approx(0.5)
        with ledger.engine.begin() as connection:
            connection.execute(Metric.__table__.delete().where(*planted))  # type: ignore[attr-defined]
        assert running.difference(ledger, first.id, compared.second.id)["train/loss"] == float("inf")

    def test_rerun_names_what_has_changed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = undisturbed()
        monkeypatch.setattr("piste.provenance.code_version", lambda _packages: "another")
        assert piste.rerun(first.id, local=True).changed == ("code_version",)

    def test_a_verb_is_called_with_its_options(self) -> None:
        done = undisturbed()
        x = [float(value) for value in final_weights(done.directory)["x"]]
        assert running.call(done.id, "where") == x
        assert running.call(done.id, "where", scale=2.0) == [2.0 * value for value in x]
        with pytest.raises(BadInput, match=r"no verb 'wher'; did you mean 'where'\?"):
            running.call(done.id, "wher")
        with pytest.raises(BadInput, match=r"where takes no 'scael'; did you mean 'scale'\?"):
            running.call(done.id, "where", scael=1.0)

    def test_a_verb_needs_a_checkpoint(self) -> None:
        run_id = running.plan(open_ledger(), "young", paced())
        with pytest.raises(BadInput, match=f"piste resume {run_id}"):
            running.call(run_id, "where")


def test_identity_is_what_decides_the_numbers() -> None:
    def of(config: Recipe, code: str = "code", data: str = "data") -> tuple[str, str]:
        return identify(config.model_dump(mode="json"), code, data)

    base = of(Config())
    assert of(paced(tracking={"experiment": "other", "system_metrics": False})) == base
    assert of(paced(resources={"max_failures": 9, "one_host": True})) == base
    identity, cell = of(paced(seed=1))
    assert identity != base[0]
    assert cell == base[1]
    for changed in (
        of(paced(optimizer={"name": "sgd", "lr": 0.2, "momentum": 0.9})),
        of(paced(resources={"workers": 2})),
        of(paced(pace={"steps": 21})),
        of(Config(), code="other"),
        of(Config(), data="other"),
    ):
        assert changed[0] != base[0]
        assert changed[1] != base[1]


def test_an_override_leaves_the_rest_of_the_workload_s_default_section() -> None:
    options = {"name": "sgd", "lr": 0.5, "momentum": 0.9}
    assert paced(optimizer={"lr": 0.5}).optimizer.model_dump(exclude={"base", "groups"}) == options
    assert paced(optimizer={"name": "adamw"}).optimizer.options == {}
    assert paced(checkpoints={"keep": "all"}).checkpoints.every == EVERY


# -- as a process --------------------------------------------------------------------------------------


def held_at(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until the run stands before a step."""

    def there() -> bool:
        assert process.poll() is None, end(process)
        return any(taken == step for taken, _ in steps_taken(folder))

    wait_until(there, f"step {step}")


def start_held(home: Path, folder: Path, step: int) -> subprocess.Popen[str]:
    process = start_piste(home, "run", paced_recipe(folder, hold_at=step), "--local", "--json")
    held_at(folder, step, process)
    return process


def assert_whole(home: Path, run_id: str, folder: Path) -> None:
    """The run equals one that nobody disturbed, and each metric is there once."""
    ledger = ledger_of(home)
    whole = undisturbed()
    assert ledger.history(run_id, "train/loss") == whole.history("train/loss")
    with ledger.engine.connect() as connection:
        rows = connection.execute(select(func.count()).where(Metric.run_id == run_id)).scalar_one()
    assert rows == STEPS
    row = ledger.run(run_id)
    assert (row.status, row.attempt, row.recomputed_different) == ("finished", 2, 0)
    assert done_again(folder) <= EVERY
    assert_same_weights(whole.directory, Path(row.directory))


def test_a_killed_run_is_resumed_bit_for_bit(shown_home: Path, tmp_path: Path, no_view: None) -> None:
    folder = tmp_path / "records"
    process = start_held(shown_home, folder, 13)
    process.send_signal(signal.SIGKILL)
    assert end(process)[0] == -signal.SIGKILL
    [row] = ledger_of(shown_home).runs()
    assert row.status == "running"  # nobody was left to say otherwise
    assert CheckpointStore(Path(row.directory) / "checkpoints").steps() == [5, 10]
    (folder / "go").touch()
    code, out, err = end(start_piste(shown_home, "resume", row.id, "--local", "--json"))
    assert code == 0, err
    assert '"status": "finished"' in out
    assert_whole(shown_home, row.id, folder)


def test_ctrl_c_ends_a_run_at_once_and_says_how_to_go_on(
    shown_home: Path, tmp_path: Path, no_view: None
) -> None:
    folder = tmp_path / "records"
    process = start_held(shown_home, folder, 13)
    children = descendants(process.pid)
    pressed = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert code == 130
    assert time.monotonic() - pressed < 5.0
    [row] = ledger_of(shown_home).runs()
    assert row.status == "interrupted"
    assert f"piste resume {row.id} --local" in err
    assert "Traceback" not in err
    assert len(children) == 1
    wait_until(lambda: not alive(children), "the end of the relay, which drains by itself", 60.0)
    assert CheckpointStore(Path(row.directory) / "checkpoints").steps() == [5, 10]
    assert [step for step, _ in ledger_of(shown_home).history(row.id, "train/loss")] == list(range(1, 13))
    (folder / "go").touch()
    piste.resume(row.id, local=True)
    assert_whole(shown_home, row.id, folder)


def test_a_terminated_run_keeps_its_last_step(shown_home: Path, tmp_path: Path, no_view: None) -> None:
    folder = tmp_path / "records"
    process = start_held(shown_home, folder, 13)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 143
    [row] = ledger_of(shown_home).runs()
    assert row.status == "interrupted"
    assert f"piste resume {row.id} --local" in err
    assert CheckpointStore(Path(row.directory) / "checkpoints").steps() == [10, 13]
    piste.resume(row.id, local=True)
    assert_whole(shown_home, row.id, folder)
    assert done_again(folder) == 0
