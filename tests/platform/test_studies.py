"""Verdicts on constructed and simulated figures, and studies of a small workload from runs to report."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from tests.platform.driving import paced_recipe, steps_taken

from piste import catalog, provenance
from piste.cli import main
from piste.errors import BadInput
from piste.home import home
from piste.ledger import open_ledger
from piste.studies import Claim, Lab, Lines, failed, reuse_or_run, study, table
from piste.verdicts import Direction, Estimate, Outcome, Verdict, decide, estimate
from piste.workload import Curve

pytest_plugins = ["tests.platform.fixtures"]

INFINITE = (-math.inf, math.inf)
FALSE_FAILURE_RATE = 1e-6


class TestDecisions:
    @pytest.mark.parametrize(
        ("interval", "direction", "outcome"),
        [
            ((0.1, 0.9), "below", "supported"),
            ((0.1, 1.0), "below", "supported"),  # on the threshold is on the claimed side
            ((0.9, 1.1), "below", "inconclusive"),
            ((1.0, 1.1), "below", "inconclusive"),
            ((1.1, 1.2), "below", "refuted"),
            ((1.1, 1.2), "above", "supported"),
            ((1.0, 1.2), "above", "supported"),
            ((0.9, 1.1), "above", "inconclusive"),
            ((0.9, 1.0), "above", "inconclusive"),
            ((0.1, 0.9), "above", "refuted"),
            ((math.inf, math.inf), "below", "refuted"),
            ((math.inf, math.inf), "above", "supported"),
            (INFINITE, "below", "inconclusive"),
            (INFINITE, "above", "inconclusive"),
        ],
    )
    def test_an_interval_beside_the_threshold(
        self, interval: tuple[float, float], direction: Direction, outcome: Outcome
    ) -> None:
        assert decide(interval, 1.0, direction) == outcome
        mirrored: Direction = "above" if direction == "below" else "below"
        assert decide((-interval[1], -interval[0]), -1.0, mirrored) == outcome

    def test_the_interval_is_that_of_a_t_test(self) -> None:
        samples = [3.2, 2.9, 3.7, 3.1]
        found = estimate(samples)
        low, high = stats.ttest_1samp(samples, 0.0).confidence_interval(0.95)
        assert found == pytest.approx((np.mean(samples), low, high), rel=1e-12)

    @pytest.mark.parametrize("samples", [[2.0], [1.0, math.nan], [1.0, math.inf], [-math.inf, math.inf]])
    def test_samples_without_an_interval(self, samples: list[float]) -> None:
        assert estimate(samples)[1:] == INFINITE

    def test_samples_that_all_diverge_are_one_infinity(self) -> None:
        assert estimate([math.inf] * 3) == Estimate(math.inf, math.inf, math.inf)
        with pytest.raises(ValueError, match="must not be empty"):
            estimate([])

    def test_how_often_a_verdict_is_wrong(self) -> None:
        """With the truth on the threshold, 2.5 % of the verdicts go to each side.

        The counts are binomial: each of the three bounds fails by chance once in a million.
        """
        trials = 20_000
        samples = np.random.default_rng(0).normal(1.0, 0.3, (trials, 5))
        outcomes = [_decided(row, 1.0) for row in samples]
        for side in ("supported", "refuted"):
            low, high = stats.binom.interval(1.0 - FALSE_FAILURE_RATE, trials, 0.025)
            assert low <= outcomes.count(side) <= high, side

    def test_a_clear_effect_is_seen_and_its_opposite_never(self) -> None:
        """Five seeds, an effect of three standard deviations: the power is known from the noncentral t."""
        trials, effect, count = 5_000, 3.0, 5
        samples = np.random.default_rng(1).normal(1.0 - effect, 1.0, (trials, count))
        outcomes = [_decided(row, 1.0) for row in samples]
        shift = effect * math.sqrt(count)
        power = stats.nct.sf(stats.t.ppf(0.975, count - 1), count - 1, shift)
        low, high = stats.binom.interval(1.0 - FALSE_FAILURE_RATE, trials, power)
        assert low <= outcomes.count("supported") <= high
        assert "refuted" not in outcomes  # each with a probability below 1e-12


def _decided(row: Sequence[float], threshold: float) -> Outcome:
    _, low, high = estimate(list(row))
    return decide((low, high), threshold, "below")


def claim(measure: Callable[[Lab], Any], **fields: Any) -> Claim:
    defaults: dict[str, Any] = {
        "id": "claim",
        "sentence": "It is small.",
        "source": "a test",
        "threshold": 1.0,
        "direction": "below",
        "expectation": "supported",
    }
    return Claim(measure=measure, **defaults | fields)


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes a module of claims; returns its dotted path."""

    def make(*claims: Claim, **attributes: Any) -> str:
        module = ModuleType("tests.made_study")
        vars(module).update(claims=claims, **attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module.__name__

    return make


@pytest.mark.usefixtures("no_view")
class TestStudies:
    @pytest.fixture
    def records(self, tmp_path: Path) -> Path:
        folder = tmp_path / "records"
        folder.mkdir()
        return folder

    def test_finished_runs_and_measurements_are_not_computed_again(
        self, records: Path, declare: Callable[..., str]
    ) -> None:
        recipe = paced_recipe(records, steps=4)

        def from_runs(lab: Lab) -> list[float]:
            return [lab.run(recipe, "train/loss", seed=seed).metrics["train/loss"] for seed in range(3)]

        def from_a_sweep(lab: Lab) -> list[float]:
            return [run.metrics["train/loss"] for run in lab.runs(recipe, "train/loss", seeds=3)]

        def from_a_grid(lab: Lab) -> list[float]:
            losses = lab.grid(recipe, "train/loss", {"optimizer.lr": [0.1, 0.2]}, seeds=3)
            return losses[0.1,]

        name = declare(
            claim(from_runs, threshold=5.0, id="runs"),
            claim(from_a_grid, threshold=5.0, id="grid"),
            claim(from_a_sweep, threshold=5.0, id="sweep"),
            claim(lambda lab: lab.measured(count_to, number=3), threshold=5.0, id="measured"),
        )
        first = study(name, local=True)
        assert [verdict.outcome for verdict in first] == ["supported"] * 4
        # three of the six runs of the grid were there, and all of the sweep
        assert first[0].samples == first[1].samples == first[2].samples
        assert first[0].runs == first[2].runs
        assert len(steps_taken(records)) == 6 * 4
        assert set(first[0].runs) < set(first[1].runs)
        assert [verdict.budget[:2] for verdict in first] == [(3, 12), (6, 24), (3, 12), (0, 0)]
        assert first[3].samples == (0.0, 1.0, 2.0)
        assert COUNTED == [3]

        assert [verdict.samples for verdict in study(name, local=True)] == [v.samples for v in first]
        assert len(steps_taken(records)) == 6 * 4
        assert COUNTED == [3]

        fresh = study(name, local=True, fresh=True)
        assert [verdict.samples for verdict in fresh] == [verdict.samples for verdict in first]
        assert len(steps_taken(records)) == (6 + 3 + 6 + 3) * 4
        assert not set(fresh[0].runs) & set(first[0].runs)
        assert COUNTED == [3, 3]

    def test_a_measurement_belongs_to_the_version_of_the_code(
        self, declare: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = declare(claim(lambda lab: lab.measured(count_to, number=2)))
        study(name)
        monkeypatch.setattr(provenance, "code_version", lambda packages: "another")
        study(name)
        assert COUNTED == [2, 2]

    def test_what_two_claims_ask_for_is_computed_once_even_when_fresh(
        self, records: Path, declare: Callable[..., str]
    ) -> None:
        recipe = paced_recipe(records, steps=4)

        def losses(lab: Lab) -> list[float]:
            return lab.grid(recipe, "train/loss", {"optimizer.lr": [0.1]}, seeds=2)[0.1,]

        first, second = study(declare(claim(losses), claim(losses)), local=True, fresh=True)
        assert len(steps_taken(records)) == 2 * 4
        assert first.runs == second.runs
        assert first.budget == second.budget

    def test_another_outcome_than_the_recorded_one_fails(self, declare: Callable[..., str]) -> None:
        verdicts = study(
            declare(
                claim(lambda lab: [0.1, 0.2], threshold=1.0, id="as expected"),
                claim(lambda lab: [1.1, 1.11], threshold=1.0, id="not so"),
                claim(lambda lab: [1.1, 1.11], threshold=1.0, id="known", expectation="refuted"),
                claim(lambda lab: [1.0, 1.1], threshold=1.05, id="open", expectation="inconclusive"),
                claim(lambda lab: Estimate(0.3, 0.2, 0.4), direction="above", id="ready"),
                claim(lambda lab: [0.3], id="alone", expectation="inconclusive"),
            )
        )
        assert [verdict.claim for verdict in failed(verdicts)] == ["not so", "ready"]
        assert [verdict.seeds for verdict in verdicts] == [2, 2, 2, 2, 0, 1]
        assert verdicts[1].how == "the 95 % interval of the mean of 2 samples is above 1"
        assert verdicts[4].how == "the 95 % interval of the estimate is below 1"
        assert verdicts[5].how == "one sample has no interval"

    def test_what_breaks_is_inconclusive_and_never_as_expected(
        self, records: Path, declare: Callable[..., str]
    ) -> None:
        recipe = paced_recipe(records, steps=4, fail_at=2)

        def bug(lab: Lab) -> list[float]:
            return [1.0 / 0]

        def losses(lab: Lab) -> list[float]:
            return lab.grid(recipe, "train/loss", {"optimizer.lr": [0.1]})[0.1,]

        run, grid, again, unknown, broken, sound = study(
            declare(
                claim(lambda lab: [lab.run(recipe, "train/loss").metrics["train/loss"]], id="run"),
                claim(losses, id="grid"),
                claim(losses, id="grid again"),
                claim(lambda lab: [lab.run("no-such", "x").metrics["x"]], id="unknown"),
                claim(bug, id="bug", expectation="inconclusive"),
                claim(lambda lab: [0.1, 0.2], id="sound"),
            ),
            local=True,
        )
        assert run.how == "not measured: RuntimeError: the laboratory is on fire"
        assert "trial 0 of paced-sweep-" in grid.how
        assert "the laboratory is on fire" in grid.how
        assert again.how == grid.how  # it was not tried once more
        assert len(steps_taken(records)) == 2 * 2
        assert "unknown recipe 'no-such'" in unknown.how
        assert broken.how == "not measured: ZeroDivisionError: float division by zero"
        assert all(verdict.outcome == "inconclusive" for verdict in (run, grid, again, unknown, broken))
        assert failed([run, grid, again, unknown, broken, sound]) == [run, grid, again, unknown, broken]
        assert "in bug" in (home() / "studies" / "error-bug.txt").read_text()  # the traceback
        assert sound.outcome == "supported"

    def test_a_loss_that_is_no_number_is_infinite(self, records: Path) -> None:
        recipe = paced_recipe(records, steps=4, nan_at=4)
        lab = Lab(local=True)
        found = lab.grid(recipe, "aux/broken", {"optimizer.lr": [0.1]}, seeds=2)
        assert found == {(0.1,): [math.inf, math.inf]}

    def test_what_is_kept(self, records: Path, declare: Callable[..., str]) -> None:
        recipe = paced_recipe(records, steps=4)

        def losses(lab: Lab) -> list[float]:
            return lab.grid(recipe, "train/loss", {"optimizer.lr": [0.1]}, seeds=lab.scale)[0.1,]

        name = declare(
            claim(losses, threshold=0.0, paper_figure=0.5, unit="nats", id="loss"),
            claim(lambda lab: [1.0, math.inf], id="diverged", expectation="inconclusive"),
            scales={"small": 2, "full": 3},
        )
        verdicts = study(name, local=True, scale="full")
        assert verdicts[0].seeds == 3
        kept = json.loads((home() / "studies" / f"{name}.json").read_text(), parse_constant=pytest.fail)
        assert (kept["study"], kept["scale"]) == (name, "full")
        loss, diverged = kept["verdicts"]
        assert loss["samples"] == list(verdicts[0].samples)
        assert {open_ledger().run(run_id).status for run_id in loss["runs"]} == {"finished"}
        assert loss["budget"]["runs"] == len(loss["runs"]) == 3
        assert (loss["outcome"], loss["expected"], loss["paper_figure"]) == ("refuted", False, 0.5)
        assert (diverged["samples"], diverged["interval"], diverged["figure"]) == (
            [1.0, None],
            [None, None],
            None,
        )
        text = (home() / "studies" / f"{name}.txt").read_text()
        assert "loss: REFUTED (NOT AS ON RECORD: supported)" in text
        assert "the paper's figure: 0.5" in text
        assert "1 of 2 samples are not finite" in text
        shown = StringIO()
        Console(file=shown, width=200).print(table(verdicts))
        assert "expected: supported" in shown.getvalue()
        words = shown.getvalue().split()
        assert "not" in words
        assert "stated" in words

    def test_learning_curves_of_the_runs(
        self, records: Path, declare: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        curve = Curve("train/loss", "loss", "rounds", seconds="train/loss")
        monkeypatch.setattr("tests.platform.paced.curve", curve, raising=False)
        (records / "broken").mkdir()
        sound = paced_recipe(records, steps=3)
        broken = paced_recipe(records / "broken", steps=3, fail_at=2)

        def lines(lab: Lab) -> Lines:
            return {f"lr {lr:g}": lab.runs(sound, "train/loss", 2, optimizer__lr=lr) for lr in (0.1, 0.2)}

        pictures = {
            "sound": lines,
            "broken": lambda lab: {"a": lab.runs(broken, "train/loss", 1)},
        }
        name = declare(claim(lambda lab: [1.0]), pictures=pictures)
        study(name, local=True)
        [picture] = (home() / "studies").glob("*.png")
        assert picture.name == f"{name}-sound.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        said = (home() / "studies" / f"{name}.txt").read_text()
        assert f"Learning curves: {picture.name}\n" in said
        assert f"{name}-broken.png: not drawn: trial 0 of " in said
        monkeypatch.setattr("tests.platform.paced.curve", None)
        study(name, local=True)
        assert "nothing to draw" in (home() / "studies" / f"{name}.txt").read_text()
        assert not picture.exists()  # that of another measurement

    def test_a_run_without_the_metric_is_named(self, records: Path) -> None:
        with pytest.raises(Exception, match="has no metric 'train/los'; did you mean 'train/loss'"):
            reuse_or_run(paced_recipe(records, steps=2), "train/los", local=True)

    def test_what_cannot_be_studied(self, declare: Callable[..., str]) -> None:
        with pytest.raises(BadInput, match="reg"):
            study("rge")
        with pytest.raises(BadInput, match="no module named 'nowhere'"):
            study("nowhere.at_all")
        with pytest.raises(BadInput, match="declares no claims"):
            study(declare())
        with pytest.raises(BadInput, match="no scale 'ful'; did you mean 'full'"):
            study(declare(claim(lambda lab: [0.0]), scales={"full": 1}), scale="ful")

    @pytest.mark.slow
    def test_on_ray_as_here(self, records: Path, declare: Callable[..., str], local_ray: None) -> None:
        recipe = paced_recipe(records, steps=3)

        def losses(lab: Lab) -> list[float]:
            runs = lab.runs(recipe, "train/loss", seeds=2)
            assert all([*(run.directory / "checkpoints").glob("step-*")] for run in runs)
            alone = lab.run(recipe, "train/loss", optimizer__lr=0.2)
            return [run.metrics["train/loss"] for run in (*runs, alone)]

        name = declare(claim(losses))
        there = study(name)
        here = study(name, local=True, fresh=True)
        assert there[0].samples == here[0].samples
        assert there[0].how == here[0].how


COUNTED: list[int] = []


@pytest.fixture(autouse=True)
def _count_from_zero() -> None:
    COUNTED.clear()


def count_to(number: int) -> list[int]:
    COUNTED.append(number)
    return list(range(number))


def test_the_catalog_knows_the_studies() -> None:
    assert catalog.find("studies", "reg").summary.startswith("REG: ")


def test_a_verdict_carries_all_of_its_claim() -> None:
    said = set(Claim.__dataclass_fields__) - {"id", "measure"}
    assert said <= set(Verdict.__dataclass_fields__)


@pytest.mark.usefixtures("no_view")
@pytest.mark.parametrize(("expectation", "code"), [("supported", 0), ("refuted", 1)])
def test_the_command_fails_where_an_outcome_is_not_as_recorded(
    declare: Callable[..., str], capsys: pytest.CaptureFixture[str], expectation: str, code: int
) -> None:
    name = declare(claim(lambda lab: [0.1, 0.11, 0.09], expectation=expectation))
    assert main(["study", name, "--local", "--json"]) == code
    [verdict] = json.loads(capsys.readouterr().out)["verdicts"]
    assert (verdict["outcome"], verdict["expectation"]) == ("supported", expectation)
    assert main(["study", name, "--local"]) == code
    assert "supported" in capsys.readouterr().out
    assert main(["study", "no-such-study"]) == 2
    assert capsys.readouterr().err.startswith("piste: unknown study 'no-such-study'")
