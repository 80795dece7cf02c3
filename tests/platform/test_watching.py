"""Watching a metric of a run in progress: the offline answer to the last bit, told to that run."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console
from tests.platform.driving import NoRelay
from tests.platform.ledgers import COLUMNS

from piste import catalog, cli, reporting, running, streams, tracking, watching
from piste.errors import BadInput, PisteError
from piste.ledger import Ledger, Message, Row, open_ledger
from piste.shards import StreamRecipe

pytest_plugins = ["tests.platform.fixtures"]

COUNT, SHIFTED = 400, 250
LOSSES = np.random.default_rng(5).normal(1.0, 0.1, COUNT)
LOSSES[SHIFTED:] += 0.3


def step_of(index: int) -> int:
    return 10 * index + 3


def begin(ledger: Ledger, directory: Path, run_id: str = "training") -> None:
    config = {"tracking": {"uri": None, "experiment": "e"}, "optimizer": {"name": "sgd"}}
    config |= {"resources": {"workers": 1}}
    ledger.create(**(COLUMNS | {"id": run_id, "directory": str(directory), "config": config}))
    ledger.begin_attempt(run_id)


def log(ledger: Ledger, first: int, end: int, losses: Any = LOSSES, run_id: str = "training") -> None:
    rows = [Row("train/loss", step_of(n), float(losses[n]), 7) for n in range(first, end)]
    rows += [Row("train/accuracy", step_of(n), 0.5, 7) for n in range(first, end)]
    ledger.apply(Message(run_id, 1, first, tuple(rows)))


class InProgress:
    """A run in progress, as who waits sees it: at each wait `size` values further, then at its end."""

    def __init__(self, ledger: Ledger, size: int, then: Callable[[int], None] = lambda reached: None) -> None:
        self._ledger, self._size, self._then = ledger, size, then
        self.reached = 0

    def is_set(self) -> bool:
        return False

    def wait(self, _seconds: float) -> None:
        if self.reached == COUNT:
            self._ledger.set_status("training", "finished")
            return
        end = min(self.reached + self._size, COUNT)
        log(self._ledger, self.reached, end)
        self.reached = end
        self._then(end)


def watch(
    ledger: Ledger, stop: object, run_id: str, fields: Mapping[str, Any] | None = None, **source: str
) -> bool:
    values = {f"source.{key}": value for key, value in ({"run": "training"} | source).items()}
    config = running.load_recipe("stream-watch", values | dict(fields or {}))
    assert isinstance(config, StreamRecipe)
    if not ledger.has(run_id):
        streams.plan(ledger, "watch", config, run_id)
    module = catalog.load_workload("stream")
    attempt = ledger.begin_attempt(run_id)
    return watching.follow(ledger, run_id, module, config, attempt, cast(threading.Event, stop))


def offline() -> tuple[float, list[Any]]:
    """The log-wealth after all losses, and the alarms, computed in one piece."""
    section = running.load_recipe("stream-watch").detectors["rise"]  # type: ignore[attr-defined]
    detector = section.build()
    detector.calibrate(LOSSES[:50])
    alarms = detector.update_many(LOSSES[50:])
    return detector.log_wealth, alarms


def check(ledger: Ledger, run_id: str) -> None:
    log_wealth, alarms = offline()
    [stream] = ledger.streams.standing(run_id)
    assert stream["name"] == "train/loss"
    assert (stream["sequence"], stream["ended"]) == (COUNT, True)
    assert stream["wealth"] == {"rise": log_wealth}
    found = ledger.streams.alarms(run_id)
    assert [(a.sequence, a.onset, a.log_wealth) for a in found] == [
        (a.sequence + 50, a.onset + 50, a.log_wealth) for a in alarms
    ]
    assert alarms[0].sequence + 50 >= SHIFTED
    told = ledger.history("training", f"alarm/train/loss/{run_id}/rise")
    assert told == [(step_of(a.sequence + 50), a.log_wealth) for a in alarms]


@pytest.mark.parametrize("size", [7, 400])
def test_a_run_in_progress_is_watched_to_its_end(size: int, no_view: None, tmp_path: Path) -> None:
    ledger = open_ledger()
    begin(ledger, tmp_path)
    assert not watch(ledger, InProgress(ledger, size), "watch")
    check(ledger, "watch")
    # An alarm that a watch has told is no difference between a run and its repetition.
    begin(ledger, tmp_path / "again", "again")
    log(ledger, 0, COUNT, run_id="again")
    assert running.difference(ledger, "training", "again") == {"train/accuracy": 0.0, "train/loss": 0.0}


class _Gone(Exception):
    """The watching process is gone."""


@pytest.mark.parametrize("where", [40, 60, 280])
def test_a_watch_that_is_killed_goes_on_and_tells_each_alarm_once(
    where: int, no_view: None, tmp_path: Path
) -> None:
    ledger = open_ledger()
    begin(ledger, tmp_path)

    def kill(reached: int) -> None:
        if reached == where:
            raise _Gone

    progress = InProgress(ledger, 20, kill)
    with pytest.raises(_Gone):
        watch(ledger, progress, "watch")
    assert not watch(ledger, progress, "watch")
    check(ledger, "watch")


def test_alarms_that_were_not_told_are_told_when_the_watch_goes_on(
    no_view: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger()
    begin(ledger, tmp_path)
    log(ledger, 0, COUNT)
    ledger.set_status("training", "finished")
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "apply", _lost)
        with pytest.raises(_Gone):
            watch(ledger, InProgress(ledger, 1), "watch")
    assert ledger.streams.alarms("watch")
    assert not ledger.history("training", "alarm/train/loss/watch/rise")
    assert not watch(ledger, InProgress(ledger, 1), "watch")
    check(ledger, "watch")


def _lost(*_: object) -> int:
    raise _Gone


class RelayHere(NoRelay):
    """A relay whose process is this one."""

    def __init__(self, url: str, name: str, uri: str, _log: Path) -> None:
        self._relay = tracking.Relay(Ledger(url), name, uri)

    def finish(self) -> dict[str, Any]:
        self._relay.step()
        return {"pending": self._relay.pending()}


def test_the_command_watches_a_run_and_the_run_is_tagged_in_mlflow(
    shown_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("piste.relay_process.RelayProcess", RelayHere)
    ledger = open_ledger()
    begin(ledger, tmp_path)
    log(ledger, 0, COUNT)
    ledger.set_status("training", "finished")
    relay = tracking.Relay(ledger, "training", tracking.tracking_uri())
    assert relay.step()  # the run's own has gone
    assert cli.main(["stream", "--watch", "train", "--json", "--name", "watch"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["status"], last["events"]) == ("finished", COUNT)
    assert last["metrics"]["alarmed/rise"] == 1.0
    check(ledger, "watch")
    shown = tracking.client(tracking.tracking_uri()).get_run(str(relay.mlflow_run_id))
    step = step_of(last["raised"][-1]["sequence"])
    assert shown.data.tags["piste.alarm"] == f"train/loss/watch/rise at {step}"
    assert cli.main(["ls", "runs"]) == 0
    methods = {line.split()[0]: line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]}
    assert methods == {"watch": "rise", "training": "sgd"}
    screen = io.StringIO()
    Console(file=screen, width=100).print(reporting.table(reporting.summary(ledger, ["watch"])))
    *headings, cells = screen.getvalue().splitlines()
    assert cells.split() == ["watch", "rise", "1"]  # without what a stream has not, such as a learning rate
    assert headings[-1].split() == ["run", "optimizer", "alarmed"]


def test_two_watches_of_a_run_tell_it_of_their_alarms_apart(no_view: None, tmp_path: Path) -> None:
    ledger = open_ledger()
    begin(ledger, tmp_path)
    log(ledger, 0, COUNT)
    ledger.set_status("training", "finished")
    for run_id in ("first", "second"):
        assert not watch(ledger, InProgress(ledger, 1), run_id)
    for run_id in ("first", "second"):
        check(ledger, run_id)
    assert ledger.run("training").recomputed_different == 0


def test_a_watch_to_the_first_alarm_ends_with_the_batch_that_has_raised_it(
    no_view: None, tmp_path: Path
) -> None:
    ledger = open_ledger()
    begin(ledger, tmp_path)
    assert not watch(ledger, InProgress(ledger, 20), "watch", until="alarm")
    first = offline()[1][0].sequence + 50
    [stream] = ledger.streams.standing("watch")
    assert (stream["sequence"], stream["ended"]) == (20 * (first // 20 + 1), True)
    assert ledger.history("training", "alarm/train/loss/watch/rise")[0][0] == step_of(first)
    assert ledger.run("training").status == "running"
    with pytest.raises(BadInput, match=r"source\.until = 'alarm' is for a metric, not for 'gamma'"):
        running.load_recipe("stream-null", {"source.until": "alarm"})


def test_a_watch_ends_where_the_driver_of_its_run_is_gone_and_goes_on_with_it(
    no_view: None, tmp_path: Path
) -> None:
    ledger, here = open_ledger(), os.uname().nodename
    begin(ledger, tmp_path)
    driver = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert driver.stdin is not None
    ledger.claim("training", f"{here}:{driver.pid}")
    assert ledger.lost_driver("training") is None
    log(ledger, 0, 270)
    driver.kill()
    driver.stdin.close()
    os.waitid(os.P_PID, driver.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and nobody has waited for it
    line = (
        rf"^training has lost its driver \({here}:{driver.pid}\): `piste resume training` continues it, "
        "and then `piste resume watch` this watch$"
    )
    with pytest.raises(PisteError, match=line):
        watch(ledger, InProgress(ledger, 1), "watch")
    assert ledger.streams.totals("watch")["events"] == 270
    assert driver.wait() != 0
    ledger.claim("training", f"{here}:{os.getpid()}")
    log(ledger, 270, COUNT)
    ledger.set_status("training", "finished")
    assert not watch(ledger, InProgress(ledger, 1), "watch")
    check(ledger, "watch")


def test_a_watch_of_an_interrupted_run_says_how_both_go_on(no_view: None, tmp_path: Path) -> None:
    ledger = open_ledger()
    begin(ledger, tmp_path)
    log(ledger, 0, 270)
    ledger.set_status("training", "interrupted")
    with pytest.raises(PisteError, match=r"^training was interrupted: `piste resume training` continues it"):
        watch(ledger, InProgress(ledger, 1), "watch")
    log(ledger, 270, COUNT)
    ledger.set_status("training", "finished")
    assert not watch(ledger, InProgress(ledger, 1), "watch")
    check(ledger, "watch")


def test_alarms_before_an_event_that_is_refused_are_told(no_view: None, tmp_path: Path) -> None:
    ledger = open_ledger()
    begin(ledger, tmp_path)
    log(ledger, 0, COUNT, np.append(LOSSES[:-1], math.nan))
    ledger.set_status("training", "finished")
    with pytest.raises(PisteError, match="its score is nan"):
        watch(ledger, InProgress(ledger, 1), "watch", {"detectors.rise.non_finite": "raise"})
    raised = ledger.streams.alarms("watch")
    assert raised
    told = [step for step, _ in ledger.history("training", "alarm/train/loss/watch/rise")]
    assert told == [step_of(alarm.sequence) for alarm in raised]


def test_a_run_that_a_sweep_has_lost_is_lost(no_view: None, tmp_path: Path) -> None:
    ledger = open_ledger()
    columns = {key: COLUMNS[key] for key in ("recipe", "workload", "config", "provenance", "directory")}
    ledger.sweeps.create(id="sweep", **columns)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ledger.sweeps.claim("sweep", f"{os.uname().nodename}:{gone.pid}")
    ledger.create(**(COLUMNS | {"id": "trial", "sweep_id": "sweep"}))
    ledger.begin_attempt("trial")
    assert ledger.lost_driver("trial") == f"{os.uname().nodename}:{gone.pid}"
    with pytest.raises(PisteError, match=r"`piste sweep --resume sweep` continues it"):
        watch(ledger, InProgress(ledger, 1), "watch", run="trial")


def test_losses_that_are_no_numbers_are_counted_and_skipped(no_view: None, tmp_path: Path) -> None:
    ledger = open_ledger()
    begin(ledger, tmp_path)
    log(ledger, 0, COUNT, np.insert(LOSSES, [0, 30, 300], [math.nan, math.inf, math.nan]))
    ledger.set_status("training", "finished")
    assert not watch(ledger, InProgress(ledger, 1), "watch")
    [stream] = ledger.streams.standing("watch")
    assert (stream["sequence"], stream["skipped"]) == (COUNT, 3)
    section = running.load_recipe("stream-watch").detectors["rise"]  # type: ignore[attr-defined]
    detector = section.build()
    detector.calibrate(LOSSES[:50])
    detector.update_many(LOSSES[50 : COUNT - 3])
    assert stream["wealth"] == {"rise": detector.log_wealth}


def test_losses_that_do_not_vary_cannot_be_watched(no_view: None, tmp_path: Path) -> None:
    ledger = open_ledger()
    begin(ledger, tmp_path)
    log(ledger, 0, COUNT, np.ones(COUNT))
    ledger.set_status("training", "finished")
    with pytest.raises(PisteError, match="calibration: scores must vary"):
        watch(ledger, InProgress(ledger, 1), "watch")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--watch", "nobody"], "no run has id 'nobody'"),
        (
            ["--watch", "training", "--metric", "train/los"],
            "training has ended without a metric 'train/los'; did you mean 'train/loss'?",
        ),
        (["stream-null", "--metric", "train/loss"], "--metric goes with --watch RUN"),
        ([], "name a recipe, or a run with --watch"),
        (["stream-watch", "--local"], "source.run is missing: piste stream --watch RUN --metric KEY"),
    ],
)
def test_what_cannot_be_watched_is_refused(
    words: list[str], message: str, no_view: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(open_ledger(), tmp_path)
    log(open_ledger(), 0, 3)
    open_ledger().set_status("training", "finished")
    assert cli.main(["stream", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_run_in_progress_may_say_later_what_is_watched(
    no_view: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = open_ledger()
    begin(ledger, tmp_path)
    assert watching.check(ledger, "train", "train/loss") == "training"
    ledger.apply(Message("training", 1, 0, (Row("system/cpu_percent", 1, 50.0, 7),)))
    progress = InProgress(ledger, COUNT)
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: progress.wait(0.0))
    monkeypatch.setattr("piste.stream_command.observer_of", lambda options: None)
    assert cli.main(["stream", "--watch", "train", "--name", "watch"]) == 0
    said = capsys.readouterr().err
    waiting = "piste: waiting for training, which is still without a metric 'train/loss'; there are: system/"
    assert waiting in said
    check(ledger, "watch")


def test_a_run_that_has_ended_without_what_was_waited_for_fails_the_watch(
    no_view: None, tmp_path: Path
) -> None:
    ledger = open_ledger()
    begin(ledger, tmp_path)
    with pytest.raises(PisteError, match="ended without a metric 'train/los'; did you mean 'train/loss'"):
        watch(ledger, InProgress(ledger, COUNT), "watch", metric="train/los")
    with pytest.raises(BadInput, match="training has ended without a metric 'valid/loss'; did you mean"):
        watching.check(ledger, "training", "valid/loss")


def test_too_few_values_to_calibrate_are_no_silent_success(no_view: None, tmp_path: Path) -> None:
    ledger = open_ledger()
    begin(ledger, tmp_path)
    log(ledger, 0, 49)
    ledger.set_status("training", "finished")
    config = running.load_recipe("stream-watch", {"source.run": "training"})
    run_id = streams.plan(ledger, "watch", config)
    assert running.execute(ledger, run_id, local=True).status == "finished"
    [line] = running.log_lines(ledger, run_id)
    assert line.endswith(
        "train/loss ended after 49 events, too few to calibrate its detectors: nothing was looked for in it"
    )
