"""Every test has a home of its own, and hypothesis draws the same examples every time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Ray reads it when it is imported, and a test may import it before piste does: the nodes that a test starts
# and the drivers that connect to them must be of one mode.
os.environ.setdefault("RAY_AUTH_MODE", "token")

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISTE_HOME", str(tmp_path / ".piste"))
    monkeypatch.delenv("PISTE_LEDGER", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
