"""ARSAM on two Ray Train workers: one decision for both, and the same weights after every step."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.workloads.small_recipes import small_recipe

import piste
from piste.config import override
from piste.running import resolve

pytest_plugins = ["tests.platform.fixtures"]


@pytest.mark.slow
def test_two_workers_decide_alike_and_hold_the_same_weights(
    local_ray: None, no_view: None, tmp_path: Path
) -> None:
    recorded = {
        "name": "tests.workloads.recorded_arsam.RecordedARSAM",
        "records": str(tmp_path),
        "window": 4,
        "base": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    }
    # A network with batch norm: its statistics differ between the workers, its weights must not.
    changes = {"model": {"name": "conv", "width": 4}, "optimizer": recorded, "train.epochs": 6}
    small = small_recipe("images", tmp_path / "small").model_dump(exclude_none=True)
    config = resolve(override(small, changes | {"resources.workers": 2}), "images")
    assert piste.run(config).status == "finished"
    lines = [(tmp_path / f"rank-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert lines[0] == lines[1]
    steps, second_passes, digests = zip(*(line.split() for line in lines[0]), strict=True)
    assert len(steps) == 12
    assert len(set(digests)) >= 11  # the schedule ends at a learning rate of 0
    assert 1 <= int(second_passes[-1]) < 12  # there was something to decide


@pytest.mark.parametrize("optimizer", ["sam", "looksam", "aesam"])
@pytest.mark.slow
def test_the_others_train_on_two_workers_too(
    optimizer: str, local_ray: None, no_view: None, tmp_path: Path
) -> None:
    chosen = {"name": optimizer, "base": {"name": "sgd", "lr": 0.05}}
    small = small_recipe("images", tmp_path / "small").model_dump(exclude_none=True)
    configs = [
        resolve(override(small, {"optimizer": chosen, "resources.workers": workers}), "images")
        for workers in (1, 2)
    ]
    one, two = piste.run(configs[0], local=True), piste.run(configs[1])
    here, there = dict(one.history("train/loss")), dict(two.history("train/loss"))
    assert here.keys() == there.keys()
    assert all(there[step] == pytest.approx(here[step], rel=1e-4) for step in here)
