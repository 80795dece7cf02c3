"""The study of ARSAM: its comparisons on constructed runs, its recipes, what it says without the mouse."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tests.platform.driving import NoRelay

from piste.building import build_optimizer
from piste.running import load_recipe
from piste.studies import Lab, failed, study
from piste_algorithms.optimizers import AESAM, ARSAM, SAM, LookSAM
from piste_workloads.studies import arsam


class PaperLab:
    """Answers with constructed runs, and notes what it was asked for."""

    def __init__(self, **metrics: Mapping[str, Sequence[Any]]) -> None:
        self.scale = arsam.Scale(2, (0.01, 0.1), {"photos": {"train__epochs": 3}})
        self._metrics = metrics
        self.asked: list[dict[str, Any]] = []

    def runs(self, recipe: str, metric: str, seeds: int, **settings: Any) -> Any:
        self.asked.append({"recipe": recipe, "seeds": seeds, **settings})
        section = settings["optimizer"]
        name = "paper" if section.get("mode") == "paper" else section["name"]
        found = self._metrics[name]
        return [
            SimpleNamespace(
                metrics={key: values[seed] for key, values in found.items() if key != "psf"},
                history=lambda key, seed=seed: list(enumerate(found["psf"][seed])),
            )
            for seed in range(seeds)
        ]

    def grid(
        self, recipe: str, metric: str, space: Mapping[str, Sequence[Any]], seeds: int, **settings: Any
    ) -> dict[tuple[Any, ...], list[float]]:
        assert settings["optimizer"]["name"] == "sgd"
        by_rate = {0.01: [0.25, 0.75], 0.1: [0.5, 0.25]}
        return {(lr,): by_rate[lr] for lr in space["optimizer.lr"]}


def lab_of(**metrics: Mapping[str, Sequence[Any]]) -> tuple[Lab, PaperLab]:
    made = PaperLab(**metrics)
    return cast(Lab, made), made


def test_accuracies_are_compared_seed_by_seed_in_points() -> None:
    lab, paper = lab_of(
        arsam={"test/accuracy": [0.5, 0.75]},
        sam={"test/accuracy": [0.25, 1.0]},
        sgd={"test/accuracy": [0.125, 0.125]},
        paper={"test/accuracy": [0.25, 0.5]},
    )
    assert arsam.difference("digits", "sam")(lab) == [25.0, -25.0]
    assert arsam.difference("digits", "base")(lab) == [37.5, 62.5]
    assert arsam.difference("digits", "sam", "paper")(lab) == [0.0, -50.0]
    arsam.difference("photos", "sam")(lab)
    assert {(asked["recipe"], asked.get("train__epochs")) for asked in paper.asked} == {
        ("digits-noise", None),
        ("arsam-photos", 3),
    }


def test_sgd_is_compared_at_its_own_best_rate() -> None:
    lab, _ = lab_of(arsam={"test/accuracy": [0.5, 0.75]})
    assert arsam.over_tuned_sgd(lab) == [25.0, 0.0]  # 0.01 has the better mean


def test_throughput_is_sams_cost_over_arsams() -> None:
    lab, _ = lab_of(
        sam={"time/cpu_s": [6.0, 9.0], "cost/gradient_evaluations": [200.0, 200.0]},
        arsam={"time/cpu_s": [4.0, 6.0], "cost/gradient_evaluations": [125.0, 160.0]},
    )
    assert arsam.throughput("photos")(lab) == [1.5, 1.5]
    assert arsam.counted_throughput("photos")(lab) == [1.6, 1.25]


def test_growth_is_that_of_the_last_third_over_the_first() -> None:
    lab, _ = lab_of(arsam={"psf": [[1.0, 3.0, 9.0, 9.0, 9.0, 2.0, 6.0], [4.0, 2.0, 1.0]]})
    assert arsam.psf_growth("digits")(lab) == [(2.0 + 6.0) / (1.0 + 3.0), 0.25]


@pytest.mark.parametrize("task", arsam.TASKS)
def test_the_optimizers_of_a_task_differ_in_nothing_but_the_method(task: str) -> None:
    recipe = arsam.TASKS[task].recipe
    own = load_recipe(recipe).optimizer
    kinds: dict[str, Any] = {"sam": SAM, "arsam": ARSAM, "paper": ARSAM, "looksam": LookSAM, "aesam": AESAM}
    model = torch.nn.Linear(2, 2)
    alone = build_optimizer(
        load_recipe(recipe, {"optimizer": arsam.optimizer(recipe, "base")}).optimizer, model
    )
    for name, kind in kinds.items():
        section = load_recipe(recipe, {"optimizer": arsam.optimizer(recipe, name)}).optimizer
        built: Any = build_optimizer(section, model, total_steps=100)
        assert type(built) is kind
        assert built.rho == own.options["rho"]
        assert built.base.defaults == alone.defaults
        assert type(built.base) is type(alone)
    assert load_recipe(recipe, {"optimizer": arsam.optimizer(recipe, "arsam")}).optimizer == own


@pytest.mark.parametrize("scale", arsam.scales)
@pytest.mark.parametrize("task", arsam.TASKS)
def test_every_scale_fits_the_recipes(scale: str, task: str) -> None:
    overrides = arsam.scales[scale].overrides.get(task, {})
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    assert load_recipe(arsam.TASKS[task].recipe, dotted).workload in {"images", "pose", "quantization"}


def test_runs_leave_what_the_claims_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piste.relay_process.RelayProcess", NoRelay)
    short = {"train__epochs": 3, "data__samples": 128}
    lab = Lab(arsam.Scale(2, (0.05,), {"digits": short, "quantization": short}), local=True)
    sam, ours = (arsam.trained(lab, "digits", name) for name in ("sam", "arsam"))
    assert [run.metrics["cost/gradient_evaluations"] for run in sam] == [12.0, 12.0]  # 3 epochs of 2 steps
    assert all(6.0 < run.metrics["cost/gradient_evaluations"] < 12.0 for run in ours)
    assert all(math.isfinite(value) for value in arsam.psf_growth("digits")(lab))
    assert all(value > 0.0 for value in arsam.throughput("digits")(lab))
    assert len(arsam.over_tuned_sgd(lab)) == 2
    assert len(arsam.difference("quantization", "sam", quantization__bits=2)(lab)) == 2


def test_without_the_mouse_its_claims_say_what_to_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PISTE_DATA", raising=False)
    monkeypatch.setattr(arsam, "claims", tuple(c for c in arsam.claims if c.id.startswith("pose")))
    verdicts = study("arsam", local=True)
    assert verdicts
    for verdict in verdicts:
        assert verdict.outcome == "inconclusive"
        assert verdict.how.startswith("not measured: ")
        assert "PISTE_DATA is not set" in verdict.how
        assert "DeepLabCut" in verdict.how


def test_claims_are_told_apart_and_say_where_they_come_from() -> None:
    assert len({claim.id for claim in arsam.claims}) == len(arsam.claims)
    assert all(claim.source.startswith((arsam.PAPER, arsam.OWN)) for claim in arsam.claims)
    figures = {claim.paper_figure for claim in arsam.claims if claim.id.endswith("throughput")}
    assert figures == {1.4}
    compared = [claim for claim in arsam.claims if claim.threshold == -1.0]
    assert {claim.id.partition("-")[0] for claim in compared} == set(arsam.TASKS)
    assert all((claim.direction, claim.unit) == ("above", "points") for claim in compared)


@pytest.mark.slow
def test_the_whole_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piste.relay_process.RelayProcess", NoRelay)
    began = time.monotonic()
    verdicts = study("arsam", local=True)
    print(f"{time.monotonic() - began:.0f} s", {verdict.claim: verdict.figure for verdict in verdicts})
    # Without the mouse its claims are not measured.
    there = [verdict for verdict in verdicts if not verdict.claim.startswith("pose")]
    assert not [verdict.how for verdict in there if verdict.broken]
    # Times depend on what else the machine does; accuracies do not.
    assert [verdict.claim for verdict in failed(there) if "throughput" not in verdict.claim] == []
