"""The study of M-FISHER, its adaptation: means on constructed runs, and streams without a shift."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from piste.running import RunResult
from piste.studies import Lab
from piste_workloads.studies import _m_fisher_adaptation as adaptation
from piste_workloads.studies import m_fisher

pytest_plugins = ["tests.platform.fixtures"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


COSTS = {"noise": 0.4, "blur": 0.2, "contrast": 0.1, "rotation": 0.1}


class PaperLab:
    """Runs of two seeds: a corruption costs each adapter what is written here."""

    scale = SimpleNamespace(adapted_seeds=2, null_runs=4)

    def runs(self, recipe: str, metric: str, seeds: int, **settings: Any) -> list[RunResult]:
        if recipe == adaptation.COORDINATES:
            return [self._run({"prompt_difference/fisher": 1e-9 * seed}) for seed in (1, 2)]
        cost = COSTS[settings["images__corruption"]]
        return [
            self._run(
                {"accuracy_during/fisher": 1 - cost / 2 + 0.01 * seed, "accuracy_during/none": 1 - cost}
            )
            for seed in range(seeds)
        ]

    def measured(self, function: Any, **arguments: Any) -> dict[str, float]:
        assert arguments == {"runs": 4}
        return {"updated": 0.25, "differing": 0.0}

    @staticmethod
    def _run(metrics: dict[str, float]) -> RunResult:
        return cast(RunResult, SimpleNamespace(metrics=metrics))


LAB = cast(Lab, PaperLab())


def test_accuracies_are_means_over_the_corruptions_a_seed() -> None:
    # 0.8 / 4 / 2 = 0.1 saved, and a hundredth more with the second seed
    assert adaptation.against("none")(LAB) == pytest.approx([0.1, 0.11])


def test_differences_are_those_of_the_twins() -> None:
    assert adaptation.apart("fisher", "prompt")(LAB) == [1e-9, 2e-9]


def test_streams_that_changed_have_an_interval() -> None:
    found = adaptation.updated_without_shift(LAB)
    assert found.figure == 0.25
    assert found.low < 0.01  # Clopper and Pearson, 1 of 4
    assert found.high == pytest.approx(0.806, abs=1e-3)
    assert adaptation.differing_logits(LAB) == (0.0, 0.0, 0.0)


def test_streams_without_a_shift_are_left_alone() -> None:
    assert adaptation.null_runs(6) == {"updated": 0.0, "differing": 0.0}


def test_the_study_has_these_claims() -> None:
    ids = [claim.id for claim in m_fisher.claims]
    assert len(set(ids)) == len(ids)
    for scale in m_fisher.scales.values():
        assert scale.adapted_seeds >= 3
        assert scale.null_runs >= 100
