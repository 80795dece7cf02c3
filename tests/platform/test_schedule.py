"""What a sweep does next: driven without Ray, in any order, cut off anywhere, trials failing in any way."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piste.ledger import Ledger, Message, Row, TrialRecord
from piste.schedule import Schedule
from piste.trials import Work, columns, outcome_of
from piste_workloads import quadratic

Objective = Callable[[dict[str, Any], int], float]
METRIC = "train/loss"


def bowl(values: dict[str, Any], seed: int) -> float:
    """Lowest at a learning rate of 0.1, a little different for each seed."""
    return (math.log10(values["optimizer.lr"]) + 1.0) ** 2 + 0.01 * seed


SPACE: dict[str, Any] = {"optimizer.lr": {"log_uniform": [1e-3, 10.0]}, "seed": {"repeats": 2}}


def plan(ledger: Ledger, **sweep: Any) -> str:
    """Records a sweep of the workload quadratic; returns its id."""
    section = {"metric": METRIC, "trials": 16, "batch": 3, "pack": False, "space": SPACE, **sweep}
    config = quadratic.Config.model_validate({"workload": "quadratic", "sweep": section})
    assert config.sweep is not None
    cells = config.sweep.cells
    sweep_id = f"sweep-{len(ledger.sweeps.newest())}"
    ledger.sweeps.create(
        id=sweep_id,
        recipe="quadratic",
        workload="quadratic",
        config=config.model_dump(mode="json"),
        provenance={},
        directory="/nowhere",
        trials=None if cells is None else cells * config.sweep.repeats,
    )
    return sweep_id


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")


def log(ledger: Ledger, run_id: str, value: float, step: int = 100) -> None:
    attempt = ledger.begin_attempt(run_id)
    rows = (Row(METRIC, 1, 1e3, 0), Row(METRIC, step, value, 0))
    ledger.apply(Message(run_id, attempt, 1, rows))


def compute(ledger: Ledger, work: Work, objective: Objective) -> None:
    """What an executor leaves in the ledger."""
    if work.packed:
        metrics = []
        for trial in work.trials:
            trial.value, trial.step = objective(trial.values, trial.seed), 100
            trial.outcome = outcome_of(trial.value)
            row = {"run_id": trial.run_id, "key": METRIC, "step": 100, "timestamp": 0}
            metrics.append({**row, "value": trial.value, "special": None})
        runs = [{**run, "status": "finished", "finished": time.time()} for run in work.runs]
        sweep_id = work.runs[0]["sweep_id"]
        ledger.sweeps.record(runs, [columns(sweep_id, trial) for trial in work.trials], metrics)
        return
    (trial,) = work.trials
    log(ledger, trial.run_id, objective(trial.values, trial.seed))
    ledger.set_status(trial.run_id, "finished")


class Cut(Exception):
    """The driver is killed."""


def drive(
    ledger: Ledger,
    sweep_id: str,
    objective: Objective = bowl,
    *,
    capacity: int = 3,
    order: random.Random | None = None,
    cut_after: int | None = None,
    most: int = 5,
    fresh: bool = False,
) -> Schedule:
    """Runs a session: so many works at a time, ending in any order, until the sweep ends or is cut off."""
    ledger.sweeps.claim(sweep_id, "host:0")
    schedule = Schedule(ledger, ledger.sweeps.get(sweep_id), fresh)
    running: list[Work] = []
    events = 0
    while True:
        while len(running) < capacity and (work := schedule.next(most)) is not None:
            running.append(work)
        if not running:
            assert schedule.ended
            ledger.sweeps.end(sweep_id, "finished", 0.0, schedule.reason)
            return schedule
        assert not schedule.ended
        work = running.pop(order.randrange(len(running)) if order else 0)
        events += 1
        if events == cut_after:
            raise Cut
        compute(ledger, work, objective)
        schedule.settle(work)


def told(ledger: Ledger, sweep_id: str) -> list[tuple[Any, ...]]:
    """What identifies and decides every trial."""
    keys = ("number", "cell", "seed", "values", "outcome", "value", "step")
    return [tuple(getattr(t, key) for key in keys) for t in ledger.sweeps.trials(sweep_id)]


TWO = SPACE | {"optimizer.name": {"grid": ["sgd", "adamw"]}}
SEARCHERS: dict[str, dict[str, Any]] = {
    "random": {"searcher": "random"},
    "tpe": {"searcher": "tpe"},
    "cmaes": {"searcher": "cmaes", "batch": 4},
    "grid": {
        "searcher": "grid",
        "trials": None,
        "space": {"optimizer.lr": {"choice": [0.01, 0.1, 1.0, 5.0]}},
    },
    "bisect": {
        "searcher": "bisect",
        "trials": None,
        "bisect": {"parameter": "optimizer.lr", "limit": 1.0},
        "space": TWO,
    },
    "strata": {
        "trials": 24,
        "searcher": "tpe",
        "space": TWO,
    },
    "plateau": {"trials": 60, "budget": {"plateau": 4}},
    "packed": {"pack": True},
    "packed tpe": {"pack": True, "searcher": "tpe"},
}


@pytest.mark.parametrize("name", SEARCHERS)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), cuts=st.lists(st.integers(1, 9), max_size=4), capacity=st.integers(1, 5))
def test_a_sweep_cut_off_anywhere_ends_with_the_trials_of_an_undisturbed_one(
    tmp_path_factory: pytest.TempPathFactory, name: str, seed: int, cuts: list[int], capacity: int
) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path_factory.mktemp('ledger') / 'ledger.db'}")
    undisturbed = plan(ledger, **SEARCHERS[name])
    drive(ledger, undisturbed)
    disturbed = plan(ledger, **SEARCHERS[name])
    order = random.Random(seed)
    for cut in cuts:
        try:
            drive(ledger, disturbed, capacity=capacity, order=order, cut_after=cut, fresh=True)
        except Cut:
            continue
    drive(ledger, disturbed, capacity=capacity, order=order, fresh=True)
    assert told(ledger, disturbed) == told(ledger, undisturbed)
    runs = [t.run_id for t in ledger.sweeps.trials(disturbed)]
    assert len(set(runs)) == len(runs)


def test_an_asynchronous_sweep_cut_off_has_as_many_trials_each_once(ledger: Ledger) -> None:
    sweep_id = plan(ledger, searcher="tpe", asynchronous=True)
    for cut in (2, 5, 7):
        with pytest.raises(Cut):
            drive(ledger, sweep_id, order=random.Random(cut), cut_after=cut)
    drive(ledger, sweep_id)
    trials = ledger.sweeps.trials(sweep_id)
    assert [t.number for t in trials] == list(range(16))
    assert {t.outcome for t in trials} == {"finished"}


def test_a_synchronous_suggestion_waits_for_the_batch_before(ledger: Ledger) -> None:
    sweep_id = plan(ledger, searcher="tpe", batch=2)
    schedule = Schedule(ledger, ledger.sweeps.get(sweep_id))
    first = [schedule.next() for _ in range(4)]  # two cells of two seeds
    assert all(work is not None for work in first)
    assert schedule.next() is None
    assert not schedule.ended
    for work in first[:3]:
        assert work is not None
        compute(ledger, work, bowl)
        schedule.settle(work)
        assert schedule.next() is None
    assert first[3] is not None
    compute(ledger, first[3], bowl)
    schedule.settle(first[3])
    assert schedule.next() is not None


def test_what_has_been_computed_is_taken_from_the_ledger(ledger: Ledger) -> None:
    first, second = plan(ledger), plan(ledger, trials=20)
    drive(ledger, first)
    computed: list[int] = []

    def count(values: dict[str, Any], seed: int) -> float:
        computed.append(seed)
        return bowl(values, seed)

    counts = drive(ledger, second, count).counts
    assert len(computed) == 4
    assert counts.reused == 16
    reused = [t for t in ledger.sweeps.trials(second) if t.reused]
    assert [t.run_id for t in reused] == [t.run_id for t in ledger.sweeps.trials(first)]
    assert [t.value for t in reused] == [bowl(t.values, t.seed) for t in reused]
    third = plan(ledger)
    assert drive(ledger, third, fresh=True).counts.reused == 0


def test_a_trial_that_ended_as_no_number_is_not_taken_from_the_ledger(ledger: Ledger) -> None:
    drive(ledger, plan(ledger, trials=2), lambda values, seed: math.nan)
    counts = drive(ledger, plan(ledger, trials=2)).counts
    assert (counts.reused, counts.finished) == (0, 2)
    assert drive(ledger, plan(ledger, trials=2)).counts.reused == 2


def test_a_cell_that_was_recorded_in_part_is_completed(ledger: Ledger) -> None:
    undisturbed = plan(ledger)
    drive(ledger, undisturbed)
    sweep_id = plan(ledger)
    schedule = Schedule(ledger, ledger.sweeps.get(sweep_id), fresh=True)
    work = schedule.next()
    assert work is not None
    compute(ledger, work, bowl)
    with ledger.writing() as connection:  # the second seed's row is lost
        connection.exec_driver_sql(f"DELETE FROM trials WHERE sweep_id = '{sweep_id}' AND number = 1")
        connection.exec_driver_sql(f"DELETE FROM runs WHERE id = '{sweep_id}-00001'")
    drive(ledger, sweep_id, fresh=True)
    assert told(ledger, sweep_id) == told(ledger, undisturbed)


def fail(ledger: Ledger, work: Work, how: str) -> str | None:
    """Leaves a run in the ledger as it is after such an end; returns what its process died of."""
    (trial,) = work.trials
    if how == "nan":
        compute(ledger, work, lambda values, seed: math.nan)
    elif how == "silent":
        ledger.begin_attempt(trial.run_id)
        ledger.set_status(trial.run_id, "finished")
    elif how in ("error", "memory"):
        ledger.begin_attempt(trial.run_id)
        ledger.set_status(
            trial.run_id, "failed", "OutOfMemoryError: too much" if how == "memory" else "ValueError"
        )
    elif how == "pruned":
        log(ledger, trial.run_id, 3.0, step=7)
    else:
        if how == "died":  # and not before it had begun
            ledger.begin_attempt(trial.run_id)
        return "its process died"
    return None


@pytest.mark.parametrize(
    ("how", "retries", "tries", "outcome", "error"),
    [
        ("died", {"died": 2}, 3, "failed", "its process died"),
        ("died early", {"died": 2}, 3, "failed", "its process died"),
        ("died", {"died": 0}, 1, "failed", "its process died"),
        ("memory", {"died": 1}, 2, "failed", "OutOfMemoryError: too much"),
        ("error", {}, 1, "failed", "ValueError"),
        ("error", {"error": 1}, 2, "failed", "ValueError"),
        ("nan", {}, 1, "failed", "train/loss ended at nan"),
        ("nan", {"nan": 2}, 3, "failed", "train/loss ended at nan"),
        ("silent", {}, 1, "failed", "it never logged 'train/loss'"),
        ("pruned", {}, 1, "pruned", None),
    ],
)
def test_a_trial_that_fails_is_tried_again_by_policy_and_never_stops_the_others(
    ledger: Ledger, how: str, retries: dict[str, int], tries: int, outcome: str, error: str | None
) -> None:
    sweep_id = plan(ledger, trials=4, retries=retries)
    schedule = Schedule(ledger, ledger.sweeps.get(sweep_id))
    tried: Counter[int] = Counter()
    while (work := schedule.next()) is not None:
        number = work.trials[0].number
        tried[number] += 1
        if number == 2:
            schedule.settle(work, fail(ledger, work, how))
        else:
            compute(ledger, work, bowl)
            schedule.settle(work)
    assert schedule.ended
    trials = ledger.sweeps.trials(sweep_id)
    assert tried == {0: 1, 1: 1, 2: tries, 3: 1}
    assert [t.outcome for t in trials] == ["finished", "finished", outcome, "finished"]
    assert trials[2].error == error
    assert {t.status for t in trials} <= {"finished", "failed", "pruned"}
    assert schedule.counts.ended == 4
    assert schedule.counts.best is not None
    assert schedule.counts.best.number != 2


def test_a_trial_that_fails_once_ends_well_and_keeps_no_trace_of_it(ledger: Ledger) -> None:
    sweep_id = plan(ledger, trials=2, retries={"nan": 1, "error": 1})
    schedule = Schedule(ledger, ledger.sweeps.get(sweep_id))
    failing = {0: "nan", 1: "error"}
    while (work := schedule.next()) is not None:
        how = failing.pop(work.trials[0].number, None)
        if how is None:
            compute(ledger, work, bowl)
        schedule.settle(work, fail(ledger, work, how) if how else None)
    trials = ledger.sweeps.trials(sweep_id)
    assert [(t.outcome, t.value, t.error) for t in trials] == [
        ("finished", bowl(t.values, t.seed), None) for t in trials
    ]
    assert ledger.history(trials[0].run_id, METRIC)[-1][1] == trials[0].value


def test_a_pack_that_cannot_be_computed_runs_alone(ledger: Ledger) -> None:
    undisturbed, sweep_id = plan(ledger), plan(ledger, pack=True)
    drive(ledger, undisturbed)
    schedule = Schedule(ledger, ledger.sweeps.get(sweep_id), fresh=True)
    sizes = []
    while (work := schedule.next(8)) is not None:
        sizes.append(len(work.trials))
        if len(sizes) == 1:
            schedule.settle(work, "MemoryError")
            continue
        compute(ledger, work, bowl)
        schedule.settle(work)
    assert sizes[0] == 8
    assert sizes[1:9] == [1] * 8
    assert told(ledger, sweep_id) == told(ledger, undisturbed)


def test_values_that_do_not_fit_together_fail_their_trial_alone(ledger: Ledger) -> None:
    space = {"problem.dimension": {"grid": [4, 0]}, "optimizer.lr": {"uniform": [0.1, 1.0]}}
    sweep_id = plan(ledger, trials=4, space=space)
    drive(ledger, sweep_id)
    trials = ledger.sweeps.trials(sweep_id)
    assert [t.outcome for t in trials] == ["finished", "failed", "finished", "failed"]
    assert "problem.dimension" in str(trials[1].error)


def test_a_diverged_cell_is_the_worst_for_the_searcher(ledger: Ledger) -> None:
    """All above 0.1 diverges: TPE stays below, as it could not if the diverged cells were left out."""
    space = {"optimizer.lr": SPACE["optimizer.lr"]}
    sweep_id = plan(ledger, searcher="tpe", trials=60, batch=6, space=space)

    def edged(values: dict[str, Any], seed: int) -> float:
        lr = values["optimizer.lr"]
        return math.nan if lr > 0.1 else abs(math.log10(lr) + 1.5)

    drive(ledger, sweep_id, edged)
    outcomes = [t.outcome for t in ledger.sweeps.trials(sweep_id)]
    assert outcomes[:6].count("finished") < 6
    assert outcomes[30:].count("finished") > 15  # a random search has 15 of 30


def test_a_sweep_says_why_it_ended_early_and_only_then(ledger: Ledger) -> None:
    early = plan(ledger, trials=60, budget={"plateau": 4})
    drive(ledger, early)
    assert len(ledger.sweeps.trials(early)) < 60
    assert ledger.sweeps.get(early).error == "budget.plateau: 4 cells without a better one"
    whole = plan(
        ledger, trials=6, budget={"plateau": 1}
    )  # used up by the last cell, of which nothing is left
    drive(ledger, whole, lambda values, seed: 1.0, fresh=True)
    assert len(ledger.sweeps.trials(whole)) == 6
    assert ledger.sweeps.get(whole).error is None


@pytest.mark.parametrize("kind", ["seconds", "cpu_seconds"])
def test_a_budget_ends_a_sweep_between_cells(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    sweep_id = plan(ledger, budget={kind: 50.0})

    def ten_seconds(values: dict[str, Any], seed: int) -> float:
        now[0] += 10.0
        return bowl(values, seed)

    def session() -> Schedule:
        ledger.sweeps.claim(sweep_id, "host:0")
        schedule = Schedule(ledger, ledger.sweeps.get(sweep_id))
        while (work := schedule.next()) is not None:
            (trial,) = work.trials
            attempt = ledger.begin_attempt(trial.run_id)
            value = ten_seconds(trial.values, trial.seed)
            ledger.apply(Message(trial.run_id, attempt, 1, (Row(METRIC, 1, value, 0),)))
            ledger.set_status(trial.run_id, "finished")
            schedule.settle(work)
        ledger.sweeps.end(sweep_id, "finished", schedule.counts.seconds, schedule.stopped_by())
        return schedule

    schedule = session()
    assert schedule.ended
    assert schedule.stopped_by() == f"budget.{kind}: 60 of 50 used"
    assert len(ledger.sweeps.trials(sweep_id)) == 6  # the cell that was begun is completed
    now[0] += 1e6  # a night between the sessions costs nothing
    assert len(ledger.sweeps.trials(sweep_id)) == 6
    assert session().counts.fresh == 0


def test_a_longer_recipe_opens_the_finished_trials(ledger: Ledger) -> None:
    sweep_id = plan(ledger, trials=4)
    drive(ledger, sweep_id)
    trials = ledger.sweeps.trials(sweep_id)
    config = ledger.sweeps.get(sweep_id).config
    longer = {**config, "problem": {**config["problem"], "steps": 200}}
    ledger.sweeps.lengthen(sweep_id, longer, [{"id": t.run_id, "config": longer} for t in trials[:2]])

    def later(values: dict[str, Any], seed: int) -> float:
        return 0.5 * bowl(values, seed)

    ledger.sweeps.claim(sweep_id, "host:0")
    schedule = Schedule(ledger, ledger.sweeps.get(sweep_id))
    while (work := schedule.next()) is not None:
        (config_now,) = work.configs
        assert isinstance(config_now, quadratic.Config)
        assert config_now.problem.steps == 200
        log(ledger, work.trials[0].run_id, later(work.trials[0].values, work.trials[0].seed), step=200)
        ledger.set_status(work.trials[0].run_id, "finished")
        schedule.settle(work)
    after = ledger.sweeps.trials(sweep_id)
    assert [t.value for t in after] == [later(t.values, t.seed) for t in trials[:2]] + [
        t.value for t in trials[2:]
    ]
    assert [t.step for t in after] == [200, 200, 100, 100]
    assert [step for step, _ in ledger.history(after[0].run_id, METRIC)] == [1, 100, 200]


def test_the_counts_add_up_at_every_moment(ledger: Ledger) -> None:
    sweep_id = plan(ledger, searcher="tpe")
    schedule = Schedule(ledger, ledger.sweeps.get(sweep_id))
    running: list[Work] = []
    order = random.Random(0)
    while not schedule.ended:
        if (work := schedule.next()) is not None:
            running.append(work)
        if running and (work is None or order.random() < 0.5):
            done = running.pop(order.randrange(len(running)))
            compute(ledger, done, bowl)
            schedule.settle(done)
        counts = schedule.counts
        assert counts.running == len(running)
        recorded: list[TrialRecord] = ledger.sweeps.trials(sweep_id)
        assert counts.finished == sum(t.outcome == "finished" for t in recorded)
        assert counts.total == 16
    assert schedule.counts.best is not None
    assert schedule.counts.best.value == min(t.value or math.inf for t in ledger.sweeps.trials(sweep_id))
    assert schedule.counts.eta == 0.0
