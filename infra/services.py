"""The store of a cluster: PostgreSQL, with databases for the ledger and MLflow, and MLflow's server."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from infra.errors import Impossible, Problem
from infra.layout import STORE, Layout, secret

ROLE = "piste"
DATABASES = ("ledger", "mlflow")
# A host that is cut off or dies must not hold its locks for the two hours of TCP's default.
KEEPALIVE = {
    "tcp_keepalives_idle": 5,
    "tcp_keepalives_interval": 2,
    "tcp_keepalives_count": 3,
    "client_connection_check_interval": "5s",  # while a query runs
}


def binaries() -> Path:
    """The folder of PostgreSQL's programs, the newest of Debian's first.

    Raises:
        Impossible: It is not installed.
    """
    found = Path("/usr/lib/postgresql").glob("[0-9]*/bin/initdb")
    if newest := max(found, key=lambda path: float(path.parts[-3]), default=None):
        return newest.parent
    if (other := shutil.which("initdb")) is not None:
        return Path(other).resolve().parent
    raise Impossible("PostgreSQL is not installed (Debian's package postgresql-15)")


def check() -> None:
    """Finds out whether the store can run here.

    Raises:
        Impossible: With what is missing.
    """
    if sys.platform != "linux":
        raise Impossible("the cluster needs Linux")
    binaries()
    owner()
    wanted = {"ray": "piste", "mlflow": "piste", "psycopg": "piste[postgres]"}
    if missing := sorted({p for module, p in wanted.items() if importlib.util.find_spec(module) is None}):
        raise Impossible(f"{sys.executable} lacks {', '.join(missing)}: pip install -e '.[postgres]'")


def owner() -> str | None:
    """Who runs PostgreSQL, which refuses to run as root; none: the one who runs this.

    Raises:
        Impossible: Root has nobody to run it.
    """
    if os.geteuid() != 0:
        return None
    import pwd

    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        raise Impossible("there is no user postgres (Debian's package postgresql-15 makes it)") from None


def prepare(layout: Layout) -> None:
    """Makes the databases and the passwords, once."""
    data, password = _data(layout), secret(layout.secrets / "password")
    secret(layout.secrets / "postgres", f"*:*:*:{ROLE}:{password}\n")
    (layout.folder / "artifacts").mkdir(exist_ok=True)
    if data.exists():
        return
    data.mkdir(mode=0o700)
    given = data.with_name("given")
    try:
        secret(given, password)
        if (user := owner()) is not None:
            shutil.chown(data, user)
            shutil.chown(given, user)
        make = ["-U", ROLE, f"--pwfile={given}", "-A", "scram-sha-256", "-E", "UTF8", "--no-locale"]
        _run(layout, ["initdb", "-D", str(data), "--no-sync", *make])
    finally:
        given.unlink(missing_ok=True)
    create = "".join(f"create database {name};\n" for name in DATABASES)
    _run(layout, ["postgres", "--single", "-D", str(data), "postgres"], create)
    allowed = "samenet" if layout.isolated else "127.0.0.1/32"
    (data / "pg_hba.conf").write_text(f"host all {ROLE} {allowed} scram-sha-256\n", encoding="utf-8")


def _data(layout: Layout) -> Path:
    return layout.folder / "databases"


def _run(layout: Layout, words: list[str], given: str = "") -> None:
    done = subprocess.run(
        [str(binaries() / words[0]), *words[1:]],
        cwd="/",
        user=owner(),
        group=owner(),
        extra_groups=None if owner() is None else [],
        input=given,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Problem(f"{words[0]}: {(done.stderr or done.stdout).strip()}")


def services(layout: Layout) -> list[dict[str, Any]]:
    """PostgreSQL and MLflow as the supervisor is told of them."""
    return [_postgres(layout), _mlflow(layout)]


def _postgres(layout: Layout) -> dict[str, Any]:
    settings = {
        "listen_addresses": "*" if layout.isolated else layout.addresses[STORE],
        "port": layout.ports["postgres"],
        "unix_socket_directories": "",
        **KEEPALIVE,
    }
    command = [str(binaries() / "postgres"), "-D", str(_data(layout))]
    command += [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
    return {"name": "postgres", "command": command, "user": owner(), "stop_signal": "SIGINT"}


def _mlflow(layout: Layout) -> dict[str, Any]:
    address = layout.at(STORE, "mlflow")
    listen = "0.0.0.0" if layout.isolated else layout.addresses[STORE]
    options = {
        "backend-store-uri": f"postgresql+psycopg://{ROLE}@{layout.at(STORE, 'postgres')}/mlflow",
        "artifacts-destination": str(layout.folder / "artifacts"),
        "host": listen,
        "port": str(layout.ports["mlflow"]),
        "workers": "1",
        "allowed-hosts": f"{address},127.0.0.1:*,localhost:*",
        "cors-allowed-origins": f"http://{address}",
    }
    return {
        "name": "mlflow",
        "command": [sys.executable, "-m", "mlflow", "server", *(f"--{k}={v}" for k, v in options.items())],
        # Its job runner is seven more processes.
        "environment": {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
    }
