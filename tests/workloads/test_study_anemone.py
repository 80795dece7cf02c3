"""The study of Anemone: its comparisons on constructed runs, and what short runs leave for them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.platform.driving import NoRelay

from piste.running import RunResult, load_recipe
from piste.studies import Lab, failed, study
from piste_workloads.studies import anemone

Validations = Sequence[float]


def run_of(validations: Validations, test: float = 0.0) -> RunResult:
    """A run that was validated after each epoch."""
    history = list(enumerate(validations, start=1))
    return cast(RunResult, SimpleNamespace(metrics={anemone.TESTED: test}, history=lambda key: history))


class PaperLab:
    """Answers with constructed runs; a rule's settings of which the first point is best, or the last."""

    scale = anemone.Scale(2, {"text": {"data__rows": 100}})

    def __init__(self, best: str = "last", **runs: Sequence[RunResult]) -> None:
        self._best = best
        self._runs = {name.replace("_", "-"): found for name, found in runs.items()}
        self.asked: list[dict[str, Any]] = []

    def grid(
        self, recipe: str, metric: str, space: Mapping[str, Sequence[Any]], seeds: int, **settings: Any
    ) -> dict[tuple[Any, ...], list[float]]:
        first, last = (tuple(values[place] for values in space.values()) for place in (0, -1))
        diverged = [math.inf, 0.0]  # a grid hands out infinity for what is no number
        return {first: [-5.0, -1.0], last: [-2.0, -3.0] if self._best == "last" else diverged}

    def runs(self, recipe: str, metric: str, seeds: int, **settings: Any) -> Sequence[RunResult]:
        self.asked.append({"recipe": recipe, "seeds": seeds, **settings})
        return self._runs[settings["rule"]["name"]]


def test_epochs_are_counted_to_the_first_that_is_as_good() -> None:
    theirs = run_of([-9.0, -7.0, -5.0, -4.0, -4.5, -4.0])  # at its best after 4 epochs
    assert anemone.share_of_epochs(run_of([-6.0, -4.0, -3.0]), theirs) == 0.5
    assert anemone.share_of_epochs(run_of([-1.0]), theirs) == 0.25
    assert anemone.share_of_epochs(run_of([-6.0, -4.1]), theirs) == anemone.NEVER


@pytest.mark.parametrize(("best", "step"), [("last", 0.4), ("first", 0.1)])
def test_a_rule_is_compared_at_the_best_of_its_settings(best: str, step: float) -> None:
    lab = PaperLab(best, anemone=[run_of([0.0])] * 2)
    anemone.tuned(cast(Lab, lab), "text", "anemone")
    [asked] = lab.asked
    ratio = 0.25 if best == "last" else 1.0
    assert asked["rule"] == {"name": "anemone", "step_size": step, "minimum_ratio": ratio}
    assert (asked["recipe"], asked["seeds"], asked["data__rows"]) == ("circuits-text", 2, 100)
    assert asked["train__keep_best"] is True


def test_the_rule_that_is_hardest_to_pass_counts_and_the_best_end() -> None:
    slow, quick = run_of([-9.0, -8.0, -7.0, -2.0], test=-3.0), run_of([-4.0, -3.0], test=-2.5)
    lab = cast(
        Lab,
        PaperLab(
            anemone=[run_of([-5.0, -2.0], test=-2.0), run_of([-5.0, -4.0, -3.0, -1.0], test=-2.75)],
            mini_batch_em=[slow, slow],
            online_em=[quick, quick],
            full_batch_em=[slow, slow],
            adam=[slow, slow],
        ),
    )
    assert anemone.against_a_step_of_a_tenth("text")(lab) == [0.5, 1.0]
    assert anemone.against_tuned("text")(lab) == [1.0, 1.5]
    assert anemone.higher("text")(lab) == [0.5, -0.25]
    assert anemone.higher("digits", ("full-batch-em",))(lab) == [1.0, 0.25]


def test_every_rule_gets_as_much_tuning() -> None:
    assert {math.prod(map(len, space.values())) for space in anemone.SPACES.values()} == {4}


def test_a_picture_has_a_line_for_every_rule_at_its_best_settings() -> None:
    lab = PaperLab("last", **{rule.replace("-", "_"): [run_of([-1.0])] * 2 for rule in anemone.SPACES})
    assert set(anemone.pictures) == set(anemone.RECIPES)
    lines = anemone.pictures["dna"](cast(Lab, lab))
    assert [*lines] == [asked["rule"]["name"] for asked in lab.asked] == [*anemone.SPACES]
    assert {asked["recipe"] for asked in lab.asked} == {"circuits-dna"}
    assert all(len(runs) == 2 for runs in lines.values())
    assert lab.asked[-1]["rule"] == {"name": "adam", "lr": 0.3}  # the last of its four settings


@pytest.mark.parametrize("scale", anemone.scales)
@pytest.mark.parametrize("task", anemone.RECIPES)
@pytest.mark.parametrize("rule", anemone.SPACES)
def test_every_setting_fits_the_recipes(scale: str, task: str, rule: str) -> None:
    settings = {key: value for key, (value, *_) in anemone.SPACES[rule].items()}
    overrides = anemone.scales[scale].overrides.get(task, {})
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    config = load_recipe(anemone.RECIPES[task], {"rule": {"name": rule}, **settings, **dotted})
    assert config.workload == "circuits"


@pytest.mark.slow
def test_runs_leave_what_the_claims_ask_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("piste.relay_process.RelayProcess", NoRelay)
    text = tmp_path / "numbers.txt"
    text.write_text(" ".join(f"{n} is {'odd' if n % 2 else 'even'} of all" for n in range(2000)), "utf-8")
    short = {"data__source": "file", "data__path": str(text), "data__rows": 200, "data__held_out_rows": 50}
    short |= {"model__latents": 4, "train__epochs": 3}
    lab = Lab(anemone.Scale(2, {"text": short}), local=True)
    assert all(0.0 < share <= 3.0 for share in anemone.against_a_step_of_a_tenth("text")(lab))
    assert all(map(math.isfinite, anemone.higher("text", ("adam",))(lab)))
    best = [run.metrics[anemone.METRIC] for run in anemone.tuned(lab, "text", "anemone")]
    histories = [run.history(anemone.VALIDATED) for run in anemone.tuned(lab, "text", "anemone")]
    assert best == [max(value for _, value in history) for history in histories]


def test_claims_are_told_apart_and_say_where_they_come_from() -> None:
    assert len({claim.id for claim in anemone.claims}) == len(anemone.claims)
    sources = (anemone.FASTER, anemone.BETTER, anemone.OWN)
    assert all(claim.source in sources for claim in anemone.claims)
    assert {claim.id.partition("-")[0] for claim in anemone.claims} == set(anemone.RECIPES)


@pytest.mark.slow
def test_the_whole_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piste.relay_process.RelayProcess", NoRelay)
    began = time.monotonic()
    verdicts = study("anemone", local=True)
    print(f"{time.monotonic() - began:.0f} s", {verdict.claim: verdict.figure for verdict in verdicts})
    assert not [verdict.how for verdict in verdicts if verdict.broken]
    assert [verdict.claim for verdict in failed(verdicts)] == []
