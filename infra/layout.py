"""Where the parts of a cluster are: hosts, addresses, ports, files."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fcntl import LOCK_EX, flock
from pathlib import Path

from infra.errors import BadCommand, Problem

HEAD, WORKERS, STORE, CLIENT = "head", ("worker1", "worker2"), "store", "client"
RAY_HOSTS = (HEAD, *WORKERS)
HOSTS = (HEAD, *WORKERS, STORE, CLIENT)
USUAL_PORTS = {"gcs": 6379, "dashboard": 8265, "postgres": 5432, "mlflow": 5000}


@dataclass(frozen=True)
class Layout:
    """One cluster.

    Attributes:
        name: Letters and digits; clusters of different names run side by side.
        isolated: Every host has namespaces of its own; else all are plain processes of this machine.
        cpus: Of each worker.
        addresses: Of every host.
        ports: By service; where all is one host, also those that Ray's nodes would otherwise fight for.
    """

    name: str
    isolated: bool
    cpus: int
    addresses: dict[str, str]
    ports: dict[str, int]

    @property
    def folder(self) -> Path:
        """Where all its files are."""
        return folder(self.name)

    @property
    def secrets(self) -> Path:
        """What only the owner may read: the token and the passwords."""
        return self.folder / "secrets"

    def at(self, host: str, service: str) -> str:
        """`HOST:PORT`; by name where names are known."""
        return f"{host if self.isolated else self.addresses[host]}:{self.ports[service]}"

    def save(self) -> None:
        """Writes it to the cluster's folder."""
        (self.folder / "cluster.json").write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def check_name(name: str) -> None:
    """Refuses what cannot name folders, namespaces and sockets.

    Raises:
        BadCommand: The name has other characters than letters and digits, or more than 12.
    """
    if not (name.isascii() and name.isalnum() and len(name) <= 12):
        raise BadCommand(f"PISTE_CLUSTER={name!r}: a cluster's name has 1 to 12 letters and digits")


def folder(name: str) -> Path:
    """A cluster's folder; short, as the path of a socket has at most 107 bytes."""
    return Path(f"/tmp/piste-{name}-{os.geteuid()}")


def load(name: str) -> Layout | None:
    """The cluster that is up under a name."""
    file = folder(name) / "cluster.json"
    return Layout(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """A cluster's folder, made if need be, for one command at a time.

    Raises:
        Problem: Somebody else has made it.
    """
    path = folder(name)
    while True:
        path.mkdir(mode=0o755, exist_ok=True)
        if path.is_symlink() or path.stat().st_uid != os.geteuid():
            raise Problem(f"{path} belongs to somebody else: choose another PISTE_CLUSTER")
        opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            flock(opened, LOCK_EX)
            # The command that had it before may have removed the folder.
            if path.exists() and os.path.samestat(os.fstat(opened), path.stat()):
                yield path
                return
        finally:
            os.close(opened)


def secret(path: Path, text: str | None = None) -> str:
    """Reads a secret; makes it first, for its owner alone, where there is none.

    Args:
        path: Its file.
        text: What it is to be; none: random letters and digits.
    """
    if not path.exists():
        with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(text or secrets.token_hex(32))
    return path.read_text(encoding="utf-8")


def free_ports(count: int) -> list[int]:
    """Different ports of loopback on which nobody listens now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
