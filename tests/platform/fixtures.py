"""Fixtures of the tests that run piste whole; a module names this one in `pytest_plugins`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tests.platform.driving import ROOT, NoRelay, environment
from tests.platform.heads import Head


@pytest.fixture
def piste_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty PISTE_HOME; torch's threads are set back afterwards, as a run sets them."""
    home = tmp_path / ".piste"
    monkeypatch.setenv("PISTE_HOME", str(home))
    for name in ("PISTE_LEDGER", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield home
    torch.set_num_threads(threads)


@pytest.fixture
def no_view(piste_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a relay: nothing is shown in MLflow."""
    monkeypatch.setattr("piste.relay_process.RelayProcess", NoRelay)


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store; making one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    program = f"from piste import tracking; tracking.client('sqlite:///{path}')"
    made = subprocess.run(
        [sys.executable, "-c", program], env=environment(path.parent), capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return path


@pytest.fixture
def shown_home(piste_home: Path, mlflow_store: Path) -> Path:
    """A PISTE_HOME whose MLflow store is there already."""
    piste_home.mkdir()
    shutil.copy(mlflow_store, piste_home / "mlflow.db")
    return piste_home


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray for all tests of a session that need one."""
    from piste.config import Resources
    from piste.training import cluster

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(ROOT))
            stack.enter_context(cluster(Resources(), dashboard=True))
        yield


@pytest.fixture(scope="session")
def ray_head() -> Iterator[Head]:
    """One Ray head for all tests of a session that send jobs."""
    head = Head()
    yield head
    head.kill()
    shutil.rmtree(head.folder, ignore_errors=True)
