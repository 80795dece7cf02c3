"""Ray Train: the same numbers on several workers, also when one of them is killed."""

from __future__ import annotations

import math
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import func, select
from tests.platform.driving import (
    PACED,
    NoRelay,
    assert_same_weights,
    done_again,
    end,
    final_weights,
    paced_recipe,
    start_piste,
    steps_taken,
    wait_until,
)
from tests.platform.paced import FAILURE

import piste
from piste import running
from piste.config import Recipe
from piste.errors import PisteError
from piste.ledger import Metric, open_ledger
from piste.running import RunResult

pytest_plugins = ["tests.platform.fixtures"]

STEPS, EVERY, NAN_AT = 20, 5, 3


def paced(workers: int, **pace: Any) -> Recipe:
    table = {"resources": {"workers": workers}, "tracking": {"system_metrics": False}, "pace": pace}
    return running.resolve({"workload": PACED, **table}, PACED)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def two(local_ray: None, records: Path) -> RunResult:
    """An undisturbed run on two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PISTE_HOME", str(records / ".piste"))
        patch.setattr("piste.relay_process.RelayProcess", NoRelay)
        return piste.run(paced(2, records=records, nan_at=NAN_AT))


def test_two_workers_compute_what_one_computes(two: RunResult, records: Path, no_view: None) -> None:
    pids = [{pid for _, pid in steps_taken(records, rank)} for rank in (0, 1)]
    assert [len(of_rank) for of_rank in pids] == [1, 1]
    assert len(pids[0] | pids[1] | {os.getpid()}) == 3  # two processes, and neither is this one
    one = piste.run(paced(1), local=True)
    pairs = zip(two.history("train/loss"), one.history("train/loss"), strict=True)
    assert len(two.history("train/loss")) == STEPS
    for (step, loss), (same_step, same_loss) in pairs:
        assert step == same_step
        assert loss == pytest.approx(same_loss, rel=1e-12)
    x = [final_weights(run.directory)["x"] for run in (two, one)]
    torch.testing.assert_close(x[0], x[1], rtol=1e-12, atol=1e-14)


def test_a_metric_that_is_not_a_number_is_recorded_and_does_no_harm(two: RunResult) -> None:
    [(step, value)] = two.history("aux/broken")
    assert step == NAN_AT
    assert math.isnan(value)
    assert two.status == "finished"
    assert all(math.isfinite(loss) for _, loss in two.history("train/loss"))


def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    two: RunResult, no_view: None, tmp_path: Path, local_ray: None
) -> None:
    def kill_rank_1() -> int:
        for rank in (0, 1):
            wait_until(lambda r=rank: any(s == 13 for s, _ in steps_taken(tmp_path, r)), f"rank {rank}")  # type: ignore[misc]
        pid = steps_taken(tmp_path, 1)[-1][1]
        os.kill(pid, signal.SIGKILL)
        (tmp_path / "go").touch()
        return pid

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill_rank_1)
        result = piste.run(paced(2, records=tmp_path, hold_at=13, nan_at=NAN_AT))
        killed = killer.result()
    taken = steps_taken(tmp_path, 1)
    assert [step for step, pid in taken if pid == killed] == list(range(1, 14))
    assert len({pid for _, pid in taken}) == 2
    row = open_ledger().run(result.id)
    assert (row.status, row.attempt, row.recomputed_different) == ("finished", 2, 0)
    assert result.history("train/loss") == two.history("train/loss")
    with open_ledger().engine.connect() as connection:
        rows = connection.execute(select(func.count()).where(Metric.run_id == result.id)).scalar_one()
    assert rows == STEPS + 1  # the losses, and what is not a number
    assert all(done_again(tmp_path, rank) <= EVERY for rank in (0, 1))
    assert_same_weights(two.directory, result.directory)


@pytest.mark.slow
def test_an_error_of_the_workload_ends_the_run_and_is_not_tried_again(
    two: RunResult, no_view: None, tmp_path: Path, local_ray: None
) -> None:
    with pytest.raises(PisteError, match=FAILURE):
        piste.run(paced(2, records=tmp_path, fail_at=7, fail_rank=1, nan_at=NAN_AT))
    from ray.util import placement_group_table  # after piste, which sets Ray's settings

    groups = placement_group_table().values()
    assert {group["state"] for group in groups} == {"REMOVED"}  # no processor is kept
    [row] = open_ledger().runs()
    assert (row.status, row.attempt, row.error) == ("failed", 1, f"RuntimeError: {FAILURE}")
    assert "in _pace" in (Path(row.directory) / "error-rank-1.txt").read_text()
    (tmp_path / "mended").touch()
    resumed = piste.resume(row.id)
    assert (resumed.status, open_ledger().run(row.id).attempt) == ("finished", 2)
    # 1 to 7, then on from the checkpoint of step 5: no step in between was tried again
    assert [step for step, _ in steps_taken(tmp_path, 1)] == [*range(1, 8), *range(6, STEPS + 1)]
    assert resumed.history("train/loss") == two.history("train/loss")
    assert_same_weights(two.directory, resumed.directory)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray cluster of two nodes of one CPU each on this host; its address."""
    import piste.training  # noqa: F401, I001 (sets Ray's settings before it is imported)
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with tempfile.TemporaryDirectory(prefix="p-") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)  # where Ray notes the address of the newest cluster
        (Path(folder) / "ray").mkdir()
        node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "temp_dir": folder})
        try:
            cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
            cluster.wait_for_nodes()
            yield cluster.address
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.mark.slow
def test_several_nodes_need_a_shared_ledger_unless_they_are_one_host(
    shown_home: Path, tmp_path: Path, two_nodes: str
) -> None:
    recipe = paced_recipe(tmp_path / "records", f'workers = 2\naddress = "{two_nodes}"')
    code, _, err = end(start_piste(shown_home, "run", recipe, "--json"))
    assert code == 2, err
    for part in ("2 nodes", "PostgreSQL", "PISTE_LEDGER", "MLFLOW_TRACKING_URI", "one_host = true"):
        assert part in err
    assert "Traceback" not in err
    assert steps_taken(tmp_path / "records") == []
    code, out, err = end(start_piste(shown_home, "run", recipe, "--json", "--resources.one_host", "true"))
    assert code == 0, err
    assert '"status": "finished"' in out
    pids = {rank: {pid for _, pid in steps_taken(tmp_path / "records", rank)} for rank in (0, 1)}
    assert pids[0].isdisjoint(pids[1])
    assert pids[1]
