"""The study of EGD: its measurements against closed forms, its claims on constructed counts of epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.platform.driving import NoRelay

from piste.running import load_recipe
from piste.studies import Lab, failed, study
from piste_workloads.grokking.config import Config
from piste_workloads.studies import egd
from piste_workloads.studies._egd_speeds import epoch_costs, steps_to_forget

pytest_plugins = ["tests.platform.fixtures"]


def test_egd_forgets_at_one_speed_and_gradient_descent_at_that_of_the_slowest_direction() -> None:
    epsilons, step_size, part = [0.3, 0.1, 0.03], 0.02, 0.05
    # 1 - k step_size <= part
    expected = math.ceil((1 - part) / step_size)
    assert steps_to_forget("egd", epsilons, step_size) == [expected] * 3
    # (1 - step_size epsilon)^k <= part
    slow = [math.ceil(math.log(part) / math.log1p(-step_size * epsilon)) for epsilon in epsilons]
    assert steps_to_forget("sgd", epsilons, step_size) == slow


def test_epochs_can_be_timed() -> None:
    assert all(0.0 < found < math.inf for found in epoch_costs(["grokking-egd", "grokking-sgd"], 1))


class PaperLab:
    """Answers with constructed runs, and notes what it was asked for."""

    def __init__(self, answer: Callable[[str, int, dict[str, Any]], Mapping[str, float]]) -> None:
        self.scale = egd.Scale(2, 2, (97,), 20.0, 10.0, (0.1, 0.01), 1)
        self._answer = answer
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def runs(self, recipe: str, metric: str, seeds: int, **settings: Any) -> list[Any]:
        config = load_recipe(recipe, {key.replace("__", "."): value for key, value in settings.items()})
        assert isinstance(config, Config)
        name = config.optimizer.name
        self.asked.append((name, settings))
        return [SimpleNamespace(metrics=self._answer(name, seed, settings)) for seed in range(seeds)]

    def run(self, recipe: str, metric: str, seed: int, **settings: Any) -> Any:
        return self.runs(recipe, metric, seed + 1, **settings)[seed]

    def grid(self, recipe: str, metric: str, space: Mapping[str, Any], **settings: Any) -> Any:
        load_recipe(recipe, {key.replace("__", "."): value for key, value in settings.items()})
        slow = not settings["task__equal"]
        return {(e,): [7.0 / e**1.1 if slow else 25.0 + (e > 0.05)] for e in space["task.epsilon"]}


def lab_of(answer: Callable[[str, int, dict[str, Any]], Mapping[str, float]]) -> tuple[Lab, PaperLab]:
    made = PaperLab(answer)
    return cast(Lab, made), made


def metrics(
    epochs: float, reached: bool = True, plateau: float = 0.0, seconds: float = 1.0
) -> dict[str, float]:
    counts = {"grok/reached": float(reached), "grok/epochs_to_95": epochs, "grok/epochs_to_85": epochs}
    return {**counts, "grok/plateau_epochs": plateau, "time/seconds_to_95": seconds}


def test_sgd_runs_for_so_many_times_the_epochs_of_egd_s_slowest_seed() -> None:
    def answer(name: str, seed: int, settings: dict[str, Any]) -> dict[str, float]:
        if name == "egd":
            return metrics([100.0, 110.0][seed])
        return metrics(settings["train__epochs"], reached=False)

    lab, paper = lab_of(answer)
    assert egd.gain("addition")(lab) == [20.0, 20.0]  # at least
    bounds = {settings["train__epochs"] for name, settings in paper.asked if name == "sgd"}
    assert bounds == {2200}


def test_a_ratio_that_was_seen_is_itself() -> None:
    slow = {"addition": 900.0, "multiplication": 1500.0}

    def answer(name: str, seed: int, settings: dict[str, Any]) -> dict[str, float]:
        return metrics(100.0 if name == "egd" else slow[settings["task__name"]] + seed)

    lab, _ = lab_of(answer)
    assert egd.gain("addition")(lab) == [9.0, 9.01]
    assert egd.gain("multiplication")(lab) == [15.0, 15.01]


def test_an_egd_that_does_not_grok_gains_nothing() -> None:
    def one_fails(name: str, seed: int, settings: dict[str, Any]) -> dict[str, float]:
        return metrics(1000.0 if name == "egd" else 3000.0, reached=name != "egd")

    lab, _ = lab_of(one_fails)
    with pytest.raises(ValueError, match="EGD has not reached 95 % on addition modulo 97"):
        egd.gain("addition")(lab)
    assert egd.parity_gain(3)(lab) == [0.0, 0.0]


def test_sgd_on_parity_runs_for_what_its_own_seed_calls_for() -> None:
    def answer(name: str, seed: int, settings: dict[str, Any]) -> dict[str, float]:
        if name == "egd":
            return metrics([40.0, 400.0][seed])
        return metrics([400.0, 300.0][seed], reached=bool(seed))

    lab, paper = lab_of(answer)
    assert egd.parity_gain(2)(lab) == [10.0, 0.75]
    assert [s["train__epochs"] for name, s in paper.asked if name == "sgd"] == [400, 4000]


def test_a_variant_that_does_not_grok_is_worse_by_what_was_seen() -> None:
    def answer(name: str, seed: int, settings: dict[str, Any]) -> dict[str, float]:
        variant = "method" in settings["optimizer"]
        return metrics(500.0 if variant else 100.0, reached=not variant)

    lab, _ = lab_of(answer)
    assert egd.column_norm_on_parity(lab) == [5.0, 5.0]
    assert egd.against_exact(method="colnorm")(lab) == [math.inf, math.inf]


def test_plateaus_and_seconds_are_of_the_same_runs() -> None:
    def answer(name: str, seed: int, settings: dict[str, Any]) -> dict[str, float]:
        if name == "egd":
            return metrics(100.0, plateau=80.0 - 10 * seed, seconds=5.0)
        return metrics(2000.0, reached=False, plateau=1600.0, seconds=[30.0, 90.0][seed])

    lab, _ = lab_of(answer)
    assert egd.plateaus(lab) == pytest.approx([0.05, 0.04375] * 2)
    assert egd.plateau_left(lab) == pytest.approx([80 / 20, 70 / 30] * 2)
    assert egd.seconds(lab) == pytest.approx([6.0, 10.0] * 2)  # at most 10


def test_variants_are_compared_with_egd_seed_by_seed() -> None:
    def answer(name: str, seed: int, settings: dict[str, Any]) -> dict[str, float]:
        return metrics((120.0 if "rank" in settings["optimizer"] else 100.0) + seed)

    lab, _ = lab_of(answer)
    assert egd.against_exact(method="rsvd", rank=128)(lab) == pytest.approx([1.2, 121 / 101])


def test_the_digits_are_counted_to_85_percent() -> None:
    def answer(name: str, seed: int, settings: dict[str, Any]) -> dict[str, float]:
        return metrics({"egd": 100.0, "grokfast": 400.0, "adamw": 800.0}[name])

    lab, paper = lab_of(answer)
    assert egd.digits_gain("adamw")(lab) == [8.0, 8.0]
    assert egd.digits_gain("adamw with little decay")(lab) == [8.0, 8.0]
    assert egd.digits_against_grokfast(lab) == [0.25, 0.25]
    adamw = [settings for name, settings in paper.asked if name == "adamw"]
    assert [settings["train__epochs"] for settings in adamw] == [1000, 1000]
    assert [settings["optimizer"]["weight_decay"] for settings in adamw] == [2.0, 0.01]


def test_figures_of_the_toy() -> None:
    lab, _ = lab_of(lambda *_: {})
    assert egd.slope(lab).figure == pytest.approx(0.1)
    assert egd.equal_speed(lab) == pytest.approx((26 / 25,) * 3)
    assert egd.toy_gain(lab).figure == pytest.approx(7.0 * 100**1.1 / 25)


def test_claims_are_told_apart_and_say_where_they_come_from() -> None:
    assert len({claim.id for claim in egd.claims}) == len(egd.claims)
    assert all(claim.source.startswith((egd.EXPERIMENTS, egd.THEORY, egd.OWN)) for claim in egd.claims)


@pytest.mark.slow
def test_the_whole_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piste.relay_process.RelayProcess", NoRelay)
    began = time.monotonic()
    verdicts = study("egd", local=True)
    print(f"{time.monotonic() - began:.0f} s", {verdict.claim: verdict.figure for verdict in verdicts})
    assert not [verdict.how for verdict in verdicts if verdict.broken]
    # Times depend on what else the machine does; counts do not.
    assert [v.claim for v in failed(verdicts) if v.claim not in {"seconds", "epoch-cost"}] == []
