"""Fixtures of the tests that need PostgreSQL; a module names this one in `pytest_plugins`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.platform.driving import free_port
from tests.platform.postgres_server import BINARIES, Postgres


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """One PostgreSQL for all tests of a session; libpq finds its password through PGPASSFILE."""
    if not BINARIES.exists():
        pytest.skip(f"PostgreSQL 15 is not in {BINARIES}: install Debian's package postgresql-15")
    with (
        tempfile.TemporaryDirectory(prefix="piste-pg-", dir="/tmp") as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        server = Postgres(folder, free_port())
        patch.setenv("PGPASSFILE", str(server.passwords))
        server.start()
        try:
            yield server
        finally:
            if server.is_running:
                server.stop()


@pytest.fixture
def postgres(postgres_server: Postgres) -> Postgres:
    """The running server, also after a test that has left it stopped."""
    if not postgres_server.is_running:
        postgres_server.start()
    return postgres_server


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """An empty database of the running server."""
    return postgres.create()


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An absent ledger, in either database."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path / 'new' / 'ledger.db'}"
