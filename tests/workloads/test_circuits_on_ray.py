"""Circuits on two Ray Train workers: what one learns, also where a worker is killed half-way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.platform.driving import assert_same_weights
from tests.workloads.small_recipes import small_recipe

import piste
from piste.config import Recipe, override
from piste.ledger import open_ledger
from piste.running import difference, resolve

pytest_plugins = ["tests.platform.fixtures"]
pytestmark = pytest.mark.slow


def two_workers(folder: Path, **changes: Any) -> Recipe:
    small = small_recipe("circuits", folder / "small").model_dump(exclude_none=True)
    workload = changes.get("workload", "circuits")
    return resolve(override(small, {"resources.workers": 2, **changes}), workload)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    local_ray: None, no_view: None, tmp_path: Path
) -> None:
    one = piste.run(small_recipe("circuits", tmp_path / "small"), local=True)
    two = piste.run(two_workers(tmp_path))
    gaps = difference(open_ledger(), one.id, two.id)
    assert max(gap for key, gap in gaps.items() if key.endswith("log_likelihood")) <= 1e-6 * abs(
        one.metrics["train/log_likelihood"]
    )
    killed = tmp_path / "killed"
    disturbed = two_workers(tmp_path, workload="tests.workloads.killed_circuits", killed=str(killed))
    again = piste.run(disturbed)
    row = open_ledger().run(again.id)
    assert killed.exists()
    assert (row.status, row.attempt, row.recomputed_different) == ("finished", 2, 0)
    assert set(difference(open_ledger(), two.id, again.id).values()) == {0.0}
    assert_same_weights(two.directory, again.directory)
