"""What the fault tests share: a run that nothing disturbs, and hosts of a cluster."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from infra.nodes import HEALTH_CHECKS
from tests.faults.disturbed import STEPS
from tests.faults.hosts import Hosts
from tests.platform.driving import ROOT, end, ledger_of, paced_recipe, start_piste


@pytest.fixture(scope="session")
def two(mlflow_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two workers on Ray that nothing disturbs: its home and its id."""
    folder = tmp_path_factory.mktemp("undisturbed")
    home = folder / ".piste"
    home.mkdir()
    shutil.copy(mlflow_store, home / "mlflow.db")
    code, _, err = end(start_piste(home, "run", paced_recipe(folder / "records", "workers = 2"), "--json"))
    assert code == 0, err
    [row] = ledger_of(home).runs()
    assert len(ledger_of(home).history(row.id, "train/loss")) == STEPS
    return home, row.id


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """A cluster of two hosts of one processor each, whose silence is noticed as by `infra`'s clusters."""
    import piste.training  # noqa: F401 (sets Ray's settings before it is imported)

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, value in HEALTH_CHECKS.items():
        monkeypatch.setenv(name, value)
    with tempfile.TemporaryDirectory(prefix="p-") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)  # where Ray notes the address of the newest cluster
        (Path(folder) / "ray").mkdir()
        hosts = Hosts(folder)
        try:
            hosts.add()
            hosts.add()
            yield hosts
        finally:
            hosts.end()
