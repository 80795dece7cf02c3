"""The study of REG: its measurements against independent ones, its claims on constructed losses."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.platform.driving import NoRelay

from piste.building import build_optimizer
from piste.config import Optimizer
from piste.running import load_recipe
from piste.studies import Lab, failed, study
from piste_workloads.llm.config import Config, Data
from piste_workloads.llm.model import GPT
from piste_workloads.llm.text import read_text
from piste_workloads.studies import _reg_operator as operator
from piste_workloads.studies import reg

TINY = {"model.layers": 1, "model.width": 16, "model.heads": 2, "model.context": 16, "data.vocab_size": 256}


def test_conditioning_agrees_with_numpy() -> None:
    expected = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        draw = {"generator": generator, "dtype": torch.float64}
        gaussian = torch.randn(21, 64, 96, **draw).numpy()  # type: ignore[call-overload]
        rows = np.exp(1.5 * torch.randn(21, 64, 1, **draw).numpy())  # type: ignore[call-overload]
        columns = np.exp(1.5 * torch.randn(21, 1, 96, **draw).numpy())  # type: ignore[call-overload]
        raw = rows * gaussian * columns
        balanced = raw / np.linalg.norm(raw, axis=2, keepdims=True)
        balanced /= np.linalg.norm(balanced, axis=1, keepdims=True)
        expected.append(np.median(np.linalg.cond(balanced)) / np.median(np.linalg.cond(raw)))
    measured = operator.condition_ratios(seeds=2, matrices=21)
    assert measured == pytest.approx(expected, rel=1e-6)
    assert max(measured) < 0.01


def test_closeness_to_adamw_on_a_tiny_model() -> None:
    found = operator.cosines("reg-small", seeds=2, steps=40, every=10, overrides=TINY)
    assert {len(values) for values in found.values()} == {2}
    for seed in range(2):
        racs, muon, momentum = (found[name][seed] for name in ("racs", "muon", "momentum"))
        assert muon < momentum < racs < 1.0
        assert racs > 0.9


def test_the_ablation_only_normalises() -> None:
    config = load_recipe(reg.RECIPE)
    assert isinstance(config, Config)
    models = [GPT(config.model, 64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    steppers = []
    for model, name in zip(models, ("frobenius", "reg"), strict=True):
        section = Optimizer.model_validate(reg.OPTIMIZERS[name] | {"lr": 0.1, "weight_decay": 0.0})
        steppers.append(build_optimizer(section, model))
    generator = torch.Generator().manual_seed(0)
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        p.grad = torch.randn(p.shape, generator=generator) * torch.linspace(0.01, 10.0, p.shape[-1])
        q.grad = p.grad.clone()
        assert name in before
    for stepper in steppers:
        stepper.step()
    matrices = 0
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert p.grad is not None
        if name.startswith("blocks") and p.ndim == 2:
            # W <- W - lr 0.2 sqrt(m n) G / ||G||_F
            update = 0.1 * 0.2 * math.sqrt(p.numel()) * p.grad / p.grad.norm()
            torch.testing.assert_close(p.detach(), before[name] - update, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(p, q, atol=1e-3)
            matrices += 1
        else:
            assert torch.equal(p, q), name
    assert matrices == 2 * 7


def test_times_are_ratios_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    calls = []

    def work(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += seconds
            calls.append(name)

        return run

    monkeypatch.setattr(operator, "time", SimpleNamespace(perf_counter=lambda: now))
    assert operator._ratios(work("a", 3.0), work("b", 12.0), 4) == [0.25] * 4
    assert calls == ["a", "b"] * 5  # the first pair warms up


@pytest.mark.parametrize("against", ["adamw", "muon"])
def test_steps_can_be_timed(against: str) -> None:
    assert all(0.0 < ratio < math.inf for ratio in operator.step_times(against, 2))


def test_the_texts_have_the_same_words_and_another_order() -> None:
    old, new = (path.read_text("utf-8") for path in reg.texts())
    bible = read_text(Data())
    assert bible.startswith(old)
    original = bible[len(old) :].split("\n")
    assert original[0].startswith("The book of the generation of Jesus Christ")
    paragraphs = new.split("\n")
    assert len(paragraphs) == len(original)
    for turned, straight in zip(paragraphs, original, strict=True):
        assert turned.split(" ") == straight.split(" ")[::-1]
    assert Counter(new.split()) == Counter("\n".join(original).split())


class PaperLab:
    """Answers with constructed losses, and notes what it was asked for."""

    def __init__(self, losses: Mapping[str, Callable[[float], Sequence[float]]], folder: Path) -> None:
        self.scale = reg.Scale(2, (1e-3, 3e-3), (1e-4, 3e-4), 5, 7, {})
        self._losses = losses
        self._folder = folder
        self.asked: list[tuple[str, tuple[float, ...]]] = []
        self.pretrained: list[dict[str, Any]] = []

    def grid(self, recipe: str, metric: str, space: Mapping[str, Sequence[Any]], **settings: Any) -> Any:
        section = settings["optimizer"]
        name = "frobenius" if "groups" in section else section["name"]
        lrs = space["optimizer.lr"]
        self.asked.append((name, tuple(lrs)))
        losses = {lr: self._losses[name](lr) for lr in lrs}
        if "init_from" not in space:
            return {(lr,): list(values) for lr, values in losses.items()}
        folders = space["init_from"]
        assert [path.rpartition("/")[2] for path in folders] == ["step-000000007"] * 2  # the last ones
        return {(lr, f): [v] for lr, values in losses.items() for f, v in zip(folders, values, strict=True)}

    def runs(self, recipe: str, metric: str, seeds: int, **settings: Any) -> Any:
        self.pretrained.append(settings)
        found = [SimpleNamespace(directory=self._folder / str(seed)) for seed in range(seeds)]
        for run in found:
            for step in (3, 7):
                (run.directory / "checkpoints" / f"step-{step:09d}").mkdir(parents=True, exist_ok=True)
        return found


def lab_of(folder: Path = Path(), **losses: Callable[[float], Sequence[float]]) -> tuple[Lab, PaperLab]:
    made = PaperLab(losses, folder)
    return cast(Lab, made), made


def test_each_optimizer_is_compared_at_its_own_best_rate() -> None:
    lab, paper = lab_of(reg=lambda lr: [2.0 + lr, 4.0 + lr], adamw=lambda lr: [1.0 - lr, 5.0 - lr])
    assert reg.scratch_against("adamw")(lab) == pytest.approx([1.001 + 0.003, -1.0 + 0.001 + 0.003])
    assert reg.close_to_adamw(lab) == pytest.approx([2.001 / 0.997, 4.001 / 4.997])
    assert {rates for _, rates in paper.asked} == {lab.scale.lrs}


def test_stability_is_judged_at_three_times_the_best_rate() -> None:
    lab, paper = lab_of(reg=lambda lr: [1e3 * lr] * 2, adamw=lambda lr: [(1e3 * lr) ** 2] * 2)
    assert reg.stable(lab) == pytest.approx([3.0 - math.log(512)] * 2)
    assert paper.asked[-1] == ("reg", (3e-3,))
    assert reg.more_stable_than_adamw(lab) == pytest.approx([(3.0 - 1.0) - (9.0 - 1.0)] * 2)


def test_fine_tuning_pairs_optimizers_on_the_same_pretrained_models(tmp_path: Path) -> None:
    lab, paper = lab_of(
        tmp_path,
        adamw=lambda lr: [1.0 + lr, 2.0 + lr],
        reg=lambda lr: [1.1 - lr, 2.2 - lr],
        muon=lambda lr: [1.3 - 10 * lr, 2.3 - 10 * lr],
    )
    assert reg.tuned_against("adamw")(lab) == pytest.approx([0.1 - 4e-4, 0.2 - 4e-4])
    assert reg.tuned_against("muon")(lab) == pytest.approx([-0.2 + 2.7e-3, -0.1 + 2.7e-3])
    assert reg.tuned_at_small_rates(lab) == pytest.approx([-0.2 + 9 * 2e-4, -0.1 + 9 * 2e-4])
    assert {settings["optimizer"]["name"] for settings in paper.pretrained} == {"adamw"}
    assert {settings["optimizer"]["lr"] for settings in paper.pretrained} == {1e-3}


def test_claims_are_told_apart_and_say_where_they_come_from() -> None:
    assert len({claim.id for claim in reg.claims}) == len(reg.claims)
    assert all(claim.source.startswith((reg.ABSTRACT, reg.OWN)) for claim in reg.claims)
    assert all(claim.paper_figure is None for claim in reg.claims)  # the abstract states no number


@pytest.mark.slow
def test_the_whole_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piste.relay_process.RelayProcess", NoRelay)
    began = time.monotonic()
    verdicts = study("reg", local=True)
    print(f"{time.monotonic() - began:.0f} s", {verdict.claim: verdict.figure for verdict in verdicts})
    assert not [verdict.how for verdict in verdicts if verdict.broken]
    # Times depend on what else the machine does; losses do not.
    assert [verdict.claim for verdict in failed(verdicts) if "cost" not in verdict.claim] == []
    again = study("reg", local=True)
    assert [verdict.samples for verdict in again] == [verdict.samples for verdict in verdicts]
    assert [verdict.runs for verdict in again] == [verdict.runs for verdict in verdicts]
