"""The life of runs, driven by a state machine: whoever dies, whatever is lost, doubled or late.

Drivers, workers and relays are simulated processes that run piste's own code; the machine chooses who goes
on, who dies and what fails where. After every step the ledger says what a model of a few dictionaries says,
and in the end every run is finished, with each of its numbers there once, in the ledger and in MLflow.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mlflow.exceptions import MlflowException
from tests.platform import counted
from tests.platform.fake_executor import Executor
from tests.platform.life_cycle_model import Expected, Model, SimulatedLedger, Stored
from tests.platform.recording_mlflow import RecordedRun, RecordingClient, RecordingServer
from tests.platform.simulated import DAMAGED, Process, World, current
from tests.platform.stand_ins import (
    SimulatedOs,
    SimulatedPids,
    SimulatedSubprocess,
    SimulatedSys,
    SimulatedThreading,
    SimulatedTime,
)

from piste import relay_process, running, tracking, training
from piste.errors import BadInput, PisteError
from piste.running import RunResult

RUNS = 2
STEPS, KEEP = (2, 3, 6), ("last 1", "last 2", "all")
EXPECTED_ERRORS: dict[str, tuple[type[BaseException], ...]] = {
    "driver": (PisteError, KeyboardInterrupt),
    "worker": (PisteError,),
    "relay": (),
    "sync": (PisteError, OSError),
}
# What has to happen in the test, each more than once.
MET = (
    "finished",
    "interrupted",
    "killed: driver",
    "killed: worker",
    "killed: relay",
    "killed: sync",
    "taken over",
    "a damaged checkpoint",
    "a late message",
    "a late request",
    "a message of an earlier attempt",
    "a row that differs",
)
index, turns = st.integers(0, 11), st.integers(1, 25)


def faults(*kinds: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(["none", *kinds]), max_size=6)


worker_faults = faults("before", "after", "late", "late", "twice", "twice")


class LifeCycle(RuleBasedStateMachine):
    """The machine; `prepare` gives it a folder and the means to replace what it stands in for."""

    folder: ClassVar[Path]
    patch: ClassVar[pytest.MonkeyPatch]
    numbers: ClassVar[itertools.count[int]]
    steps: ClassVar[int]
    met: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.home = self.folder / str(next(self.numbers))
        self.world = World()
        self.model = Model(self.world)
        self.ledger = SimulatedLedger(f"sqlite:///{self.home / 'ledger.db'}", self.model)
        self.plain = sqlite3.connect(self.home / "ledger.db", isolation_level=None)
        self.executor = Executor(self.world)
        self.server = RecordingServer()
        self._surround()

    def _surround(self) -> None:
        executor, system = self.executor, SimulatedOs(self.world)
        clock, threads = SimulatedTime(self.world), SimulatedThreading(self.world)
        replaced: dict[str, Any] = {
            "ledger.runs.psutil": SimulatedPids(self.world),
            "relay_process.Ledger": lambda _url, **_: self.ledger,
            "relay_process.subprocess": SimulatedSubprocess(self.world, "relay", _relay),
            "relay_process.sys": SimulatedSys(),
            "running.on_terminate": on_terminate,
            "running.open_ledger": lambda: self.ledger,
            "tracking.client": lambda _uri: RecordingClient(self.server),
            "training.TorchTrainer": executor.trainer,
            "training.ask": executor.ask,
            "training.cluster": executor.cluster,
            "training.ray": executor.ray,
            "training.start_writer": executor.start_writer,
            "writer.Ledger": lambda _url, **_: self.ledger,
            "writer.ask": executor.ask,
            "writer.ray": executor.ray,
        }
        for module in ("buffer", "ledger.runs", "relay_process", "tracking", "workload", "writer"):
            replaced[f"{module}.time"] = clock
        for module in ("buffer", "relay_process", "training"):
            replaced[f"{module}.threading"] = threads
        for module in ("checkpoints", "relay_process", "running"):
            replaced[f"{module}.os"] = system
        for name, value in replaced.items():
            self.patch.setattr(f"piste.{name}", value)
        self.patch.setenv("PISTE_HOME", str(self.home))

    # -- what users do ------------------------------------------------------------------------------

    @initialize(seed=st.integers(0, 1), steps=st.sampled_from(STEPS), keep=st.sampled_from(KEEP))
    def submit_first(self, seed: int, steps: int, keep: str) -> None:
        self.submit(seed, steps, keep)

    @precondition(lambda self: len(self.model.runs) < RUNS)
    @rule(
        seed=st.integers(0, 1),
        steps=st.sampled_from(STEPS),
        keep=st.sampled_from(KEEP),
    )
    def submit(self, seed: int, steps: int, keep: str) -> None:
        config = {
            "workload": "tests.platform.counted",
            "seed": seed,
            "count": {"steps": steps},
            "checkpoints": {"every": 2, "keep": keep},
            "resources": {"max_failures": 1},
            "tracking": {"system_metrics": False, "uri": "http://recorded"},
        }
        running.plan(self.ledger, "counted", running.resolve(config, "the machine"))

    @precondition(lambda self: self.model.runs and len(self.world.living("driver")) < 3)
    @rule(which=index, turns=st.sampled_from([1, 1, 4, 12, 25]), faults=worker_faults)
    def start(self, which: int, turns: int, faults: list[str]) -> None:
        """A driver of a new run, or of one that is resumed; what goes wrong waits for its workers."""
        run = self._run(which)
        if run.is_ending():
            return
        if run.owner is None:
            program = partial(running.execute, self.ledger, run.id, local=False)
        else:
            program = partial(running.resume, run.id)
        driver = self.world.start("driver", program)
        driver.inherited = faults
        for _ in range(turns):
            self._step(driver)

    @precondition(lambda self: self.world.living("driver"))
    @rule(which=index)
    def interrupt(self, which: int) -> None:
        pick(self.world.living("driver"), which).main.interrupted = True

    @precondition(lambda self: self.world.living("driver"))
    @rule(which=index, turns=turns)
    def terminate(self, which: int, turns: int) -> None:
        driver = pick(self.world.living("driver"), which)
        driver.terminated.set()
        self._go_on(driver, turns)

    @precondition(lambda self: self.model.runs and not self.world.living("sync"))
    @rule(which=index)
    def sync(self, which: int) -> None:
        self.world.start("sync", partial(tracking.sync, self.ledger, [("run", self._run(which).id)]))

    # -- what happens -------------------------------------------------------------------------------

    @precondition(lambda self: self.world.living("driver"))
    @rule(which=index, turns=turns, faults=faults("before", "after"))
    def advance_a_run(self, which: int, turns: int, faults: list[str]) -> None:
        """A driver goes on, and its workers; what goes wrong waits for the driver."""
        driver = pick(self.world.living("driver"), which)
        driver.faults.extend(faults)
        self._go_on(driver, turns)

    def _go_on(self, driver: Process, turns: int) -> None:
        for _ in range(turns):
            for process in (driver, *self.world.living("worker")):
                if process.driver is driver:
                    self._step(process)

    @precondition(lambda self: self.world.living("driver"))
    @rule(which=index)
    def advance_to_its_end(self, which: int) -> None:
        """A driver, its workers and its relay, while everybody else stands still."""
        driver = pick(self.world.living("driver"), which)
        for _ in range(300):
            for process in self.world.living():
                if process.driver is driver:
                    self._step(process)
            if driver.dead:
                return

    @precondition(lambda self: self.world.living("worker"))
    @rule(which=index, turns=turns, faults=worker_faults)
    def advance_a_worker(self, which: int, turns: int, faults: list[str]) -> None:
        self._advance("worker", which=which, turns=turns, faults=faults)

    @precondition(lambda self: self.world.living("relay", "sync"))
    @rule(which=index, turns=turns, faults=faults("before", "after", "late", "twice", "partly"))
    def advance_a_relay(self, which: int, turns: int, faults: list[str]) -> None:
        self._advance("relay", "sync", which=which, turns=turns, faults=faults)

    def _advance(self, *kinds: str, which: int, turns: int, faults: list[str]) -> None:
        process = pick(self.world.living(*kinds), which)
        process.faults.extend(faults)
        for _ in range(turns):
            self._step(process)

    @precondition(lambda self: self.world.living())
    @rule(rounds=st.integers(1, 20))
    def advance_all(self, rounds: int) -> None:
        for _ in range(rounds):
            for process in self.world.living():
                self._step(process)

    @precondition(lambda self: self.world.living())
    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 61.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.world.now += seconds

    @precondition(lambda self: self.world.living("worker"))
    @rule(which=index)
    def kill_a_worker(self, which: int) -> None:
        self._kill("worker", which=which)

    @precondition(lambda self: self.world.living("driver"))
    @rule(which=index)
    def kill_a_driver(self, which: int) -> None:
        self._kill("driver", which=which)

    @precondition(lambda self: self.world.living("relay", "sync"))
    @rule(which=index)
    def kill_a_relay(self, which: int) -> None:
        self._kill("relay", "sync", which=which)

    def _kill(self, *kinds: str, which: int) -> None:
        process = pick(self.world.living(*kinds), which)
        self.model.met[f"killed: {process.kind}"] += 1
        self.world.note(f"{process.kind} {process.pid} is killed")
        process.kill()
        self._orphans_end(process)

    @precondition(lambda self: self.world.living("worker"))
    @rule(which=index)
    def stumble(self, which: int) -> None:
        pick(self.world.living("worker"), which).stumbles = True

    @precondition(lambda self: self.world.living("worker"))
    @rule(which=index)
    def take_a_host_away(self, which: int) -> None:
        self.executor.draining.add(f"node-{pick(self.world.living('worker'), which).pid}")

    @precondition(lambda self: any(run.durable() for run in self.model.runs.values()))
    @rule(which=index, part=st.sampled_from(["manifest", "state"]))
    def damage_a_checkpoint(self, which: int, part: str) -> None:
        run = pick([run for run in self.model.runs.values() if run.durable()], which)
        folder = run.directory / "checkpoints" / f"step-{run.durable():09d}"
        if part == "manifest":
            (folder / "manifest.json").unlink(missing_ok=True)
        else:
            (folder / "rank-0.pt").write_bytes((folder / "rank-0.pt").read_bytes()[:-7])
        (folder / DAMAGED).touch()
        self.model.met["a damaged checkpoint"] += 1

    @precondition(lambda self: self.executor.late)
    @rule(which=index)
    def a_late_message_arrives(self, which: int) -> None:
        self.model.met["a late message"] += 1
        with suppress(PisteError):  # it may be of an earlier attempt
            self.executor.late.pop(which % len(self.executor.late))()

    @precondition(lambda self: self.server.late)
    @rule(which=index)
    def a_late_request_is_carried_out(self, which: int) -> None:
        self.model.met["a late request"] += 1
        with suppress(MlflowException):  # what it is about may be there already
            self.server.late.pop(which % len(self.server.late))()

    # -- what must be -------------------------------------------------------------------------------

    @invariant()
    def agree(self) -> None:
        """Ledger and model agree, and MLflow shows nothing that the ledger has not."""
        type(self).steps += 1
        assert not self.world.violations, self.world.violations
        assert not self.server.refused, self.server.refused
        for run_id, stored in self.model.check(self.plain).items():
            rows = {each.id: shown(each) for each in stored}
            for view in self.server.of(run_id):
                assert view.metrics.keys() <= set(rows.values()), "MLflow shows what the ledger does not have"
                mark = int(view.tags.get(tracking.MARK, 0))
                below = {row for number, row in rows.items() if number <= mark}
                assert below <= view.metrics.keys(), "the mark is ahead of the rows"

    def teardown(self) -> None:
        try:
            self._settle()
        finally:
            note("\n".join(self.world.history))
            self.world.end()
            self.plain.close()
            self.ledger.engine.dispose()
            shutil.rmtree(self.home)
            type(self).met += self.model.met

    def _settle(self) -> None:
        """Nothing more is done to anybody; in the end each run is whole, and MLflow shows it."""
        self._until_ended("driver", "relay", "sync")
        self.world.end()
        for arrive in (self._everything_late_arrives, lambda: None):
            for run in self.model.runs.values():
                self._shown_after_sync(run)
            arrive()
        for run in self.model.runs.values():
            if run.status != "finished":
                driver = self.world.start("driver", partial(running.resume, run.id))
                self._until_ended("driver", "relay")
                assert isinstance(driver.main.result, RunResult), repr(driver.main.error)
                assert driver.main.result.pending == 0, "the relay has left something behind"
                self._everything_late_arrives()
            assert run.status == "finished"
            with pytest.raises(BadInput, match="has finished"):
                running.resume(run.id)
            everything = itertools.product(counted.KEYS, range(1, run.steps + 1))
            assert set(run.first) == set(everything), "the run has finished without all of its metrics"
            sums = {step: value for (key, step), (value, _) in run.first.items() if key == "sum"}
            assert sums == {step: repr(float(counted.state(step))) for step in sums}
            self._is_shown_whole(run)

    def _everything_late_arrives(self) -> None:
        for late in [*self.executor.late, *self.server.late]:
            with suppress(PisteError, MlflowException):
                late()
        self.agree()

    def _shown_after_sync(self, run: Expected) -> RecordedRun:
        """Once a run is synchronised, MLflow has the ledger's rows, in one run."""
        shown_before, made = bool(self.server.of(run.id)), len(self.server.recorded)
        assert tracking.sync(self.ledger, [("run", run.id)]) == {run.id: 0}
        assert len(self.server.recorded) == made + (not shown_before), "what is shown was shown anew"
        [view], stored = self.server.of(run.id), self.model.check(self.plain)[run.id]
        assert sorted(view.metrics) == sorted(shown(each) for each in stored)
        return view

    def _is_shown_whole(self, run: Expected) -> None:
        view, row = self._shown_after_sync(run), self.ledger.run(run.id)
        ended = ("FINISHED", int((row.finished or 0.0) * 1000))
        assert (view.status, view.end) == ended, f"{view.status} at {view.end} is shown for {ended}"
        names = ("status", "attempts", "error")
        assert [view.tags[f"piste.{name}"] for name in names] == ["finished", str(row.attempt), ""]
        # A message that is repeated after the end counts again in the ledger.
        counted_then = int(view.tags["piste.recomputed_different"])
        assert len(run.different) <= counted_then <= row.recomputed_different
        assert view.params["count.steps"] == str(row.config["count"]["steps"])
        table = Path(row.directory) / "artifacts" / "state.json"
        assert view.artifacts["state.json"] == hashlib.sha256(table.read_bytes()).hexdigest()
        assert {"recipe.toml", "environment.txt", "provenance.json"} <= view.artifacts.keys()

    # -- the means ----------------------------------------------------------------------------------

    def _run(self, which: int) -> Expected:
        found: Expected = pick(list(self.model.runs.values()), which)
        return found

    def _step(self, process: Process) -> None:
        if process.dead:
            return
        process.step()
        self.world.now += 0.05
        if process.dead:
            error = process.main.error
            if error is not None and not isinstance(error, EXPECTED_ERRORS[process.kind]):
                raise AssertionError(f"a {process.kind} has ended unexpectedly") from error
            if isinstance(process.main.result, RunResult):
                self.model.met[process.main.result.status] += 1
            self._orphans_end(process)

    def _orphans_end(self, process: Process) -> None:
        """Ray ends the processes of a driver that has gone."""
        for other in self.world.living("worker"):
            if other.driver is process:
                other.kill()

    def _until_ended(self, *kinds: str) -> None:
        for _ in range(3000):
            if not self.world.living(*kinds):
                return
            for process in self.world.living():
                self._step(process)
            self.world.now += 0.2
        raise AssertionError(f"they never end: {[p.kind for p in self.world.living(*kinds)]}")


def pick(some: Sequence[Any], which: int) -> Any:
    return some[which % len(some)]


def shown(row: Stored) -> tuple[str, int, float, int]:
    """As MLflow is to have it."""
    value = float(row.value)
    if math.isfinite(value):
        return row.key, row.step, value, row.timestamp
    return f"nonfinite/{row.key}", row.step, 1.0, row.timestamp


@contextmanager
def on_terminate(_grace_seconds: float) -> Iterator[threading.Event]:
    """Signals reach a main thread alone: what SIGTERM sets is the process's own."""
    task = current()
    assert task is not None
    yield task.process.terminated


def _relay(command: list[str]) -> dict[str, Any]:
    """`python -m piste.relay_process URL KIND NAME URI`."""
    url, kind, name, uri = command[3:]
    return relay_process._follow(url, "sweep" if kind == "sweep" else "run", name, uri)


def prepare(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Gives the machine its folder, and replaces what would be slow and is not under test."""
    LifeCycle.folder, LifeCycle.patch = folder, patch
    LifeCycle.numbers, LifeCycle.met, LifeCycle.steps = itertools.count(), Counter(), 0
    for name, value in {"code_version": "code", "collect": {}, "environment": ""}.items():
        patch.setattr(f"piste.provenance.{name}", lambda *_, value=value: value)
    patch.setattr(tracking, "check", lambda _uri: None)
    patch.setattr(tracking, "BATCH", 4)
    patch.setattr(training, "preflight", lambda *_: None)


def test_the_life_cycle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, monkeypatch)
    threads = torch.get_num_threads()
    try:
        run_state_machine_as_test(
            LifeCycle,
            settings=settings(
                max_examples=100, stateful_step_count=50, suppress_health_check=list(HealthCheck)
            ),
        )
    finally:
        torch.set_num_threads(threads)
    assert LifeCycle.steps > 3000
    assert not [what for what in MET if LifeCycle.met[what] < 2], LifeCycle.met
