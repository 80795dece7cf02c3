"""What the fault tests share: a run that nothing disturbs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.faults.disturbed import STEPS
from tests.platform.driving import end, ledger_of, paced_recipe, start_piste


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
