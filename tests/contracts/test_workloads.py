"""The battery for workloads: every one that the catalog finds, with a small configuration.

A workload module declares `test_settings`: dotted overrides that make a run of its defaults last six
steps and a second at most, with a checkpoint every two; `{text}` in a value stands for a small text file,
`{poses}` for tiny pictures with keypoints, `{model}` for a tiny pre-trained model.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.platform.driving import assert_same_weights
from tests.workloads.small_recipes import small_recipe

import piste
from piste import catalog
from piste.config import Recipe, to_toml
from piste.ledger import WALL_CLOCK, open_ledger
from piste.running import RunResult, difference, resolve
from piste.workload import Run

pytest_plugins = ["tests.platform.fixtures"]
# Ray Train takes seconds to start: one in `make test`, all of them in `make test-slow`.
QUICK_ON_RAY = {"llm"}
every_workload = pytest.mark.parametrize("name", list(catalog.members("workloads")))


@pytest.fixture
def small(tmp_path: Path, no_view: None) -> Callable[[str], Recipe]:
    return lambda name: small_recipe(name, tmp_path / "small")


def numbers(result: RunResult) -> dict[str, list[tuple[int, float]]]:
    """All that a run has computed; measurements of the machine are left out."""
    keys = [key for key in result.metrics if not key.startswith(WALL_CLOCK)]
    return {key: result.history(key) for key in keys}


def stop_at(patch: pytest.MonkeyPatch, last: int) -> None:
    """Runs are asked to end once they log something of that step."""
    original = Run.log

    def log(self: Run, metrics: Mapping[str, float], step: int) -> None:
        original(self, metrics, step)
        if step >= last:
            self.stop()

    patch.setattr(Run, "log", log)


class Crash(Exception):
    """Stands for whatever ends a process."""


def crash_after_checkpoint(patch: pytest.MonkeyPatch, last: int) -> None:
    """Runs crash once they have a checkpoint of that step or a later one."""
    original = Run.report

    def report(self: Run, metrics: Mapping[str, float], step: int, checkpoint: Any = None) -> None:
        original(self, metrics, step, checkpoint)
        if checkpoint is not None and step >= last:
            raise Crash

    patch.setattr(Run, "report", report)


def test_finds_the_workloads() -> None:
    assert {"llm", "quadratic"} <= set(catalog.members("workloads"))


@every_workload
def test_takes_steps(name: str, small: Callable[[str], Recipe]) -> None:
    result = piste.run(small(name), local=True)
    assert result.status == "finished"
    losses = dict(result.history("train/loss"))
    assert {1, 2} <= losses.keys()
    assert all(math.isfinite(loss) for loss in losses.values())
    assert len(set(losses.values())) > 1, "the loss never changes"
    assert [path for path in result.artifacts if path.startswith("step-")], "no final checkpoint"


@every_workload
def test_a_configuration_survives_toml(name: str, small: Callable[[str], Recipe]) -> None:
    module = catalog.load_workload(name)
    for config in (small(name), module.Config()):
        assert resolve(tomllib.loads(to_toml(config)), name) == config


@every_workload
@pytest.mark.parametrize("way", [stop_at, crash_after_checkpoint])
def test_goes_on_bit_for_bit(
    name: str, way: Callable[[pytest.MonkeyPatch, int], None], small: Callable[[str], Recipe]
) -> None:
    whole = piste.run(small(name), local=True)
    with pytest.MonkeyPatch.context() as patch:
        way(patch, 3)
        try:
            run_id = piste.run(small(name), local=True).id
        except Crash:
            run_id = open_ledger().runs(limit=1)[0].id
    assert open_ledger().run(run_id).status in {"interrupted", "failed"}
    resumed = piste.resume(run_id, local=True)
    assert resumed.status == "finished"
    assert open_ledger().run(run_id).attempt == 2
    assert numbers(resumed) == numbers(whole)
    assert open_ledger().run(run_id).recomputed_different == 0
    assert_same_weights(whole.directory, resumed.directory)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK_ON_RAY else pytest.mark.slow)
        for name in catalog.members("workloads")
    ],
)
def test_computes_the_same_on_ray_train(name: str, small: Callable[[str], Recipe], local_ray: None) -> None:
    here = piste.run(small(name), local=True)
    there = piste.run(small(name))
    gaps = difference(open_ledger(), here.id, there.id)
    assert "train/loss" in gaps
    assert set(gaps.values()) == {0.0}
    assert_same_weights(here.directory, there.directory)
