"""A real PostgreSQL 15 on loopback, and a way to it that can be cut."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import psycopg

BINARIES = Path("/usr/lib/postgresql/15/bin")  # Debian's package postgresql-15
ROLE, PASSWORD = "piste", "a password of tests"


class Postgres:
    """A database cluster in a folder of its own.

    Args:
        folder: An empty folder; its parents can be entered by everyone.
        port: A free port.
    """

    def __init__(self, folder: Path, port: int) -> None:
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        self._data, self._log = folder / "data", folder / "postgres.log"
        self.port = port
        self.passwords = folder / "passwords"
        secret = folder / "secret"
        secret.write_text(PASSWORD, encoding="utf-8")
        self.passwords.write_text(f"127.0.0.1:*:*:{ROLE}:{PASSWORD}\n", encoding="utf-8")
        self.passwords.chmod(0o600)
        if self._user is not None:
            for path in (folder, secret):
                shutil.chown(path, self._user)
        make = [
            "initdb",
            "-U",
            ROLE,
            f"--pwfile={secret}",
            "-A",
            "scram-sha-256",
            "-E",
            "UTF8",
            "--no-locale",
        ]
        self._command(*make, "--no-sync", "-D", str(self._data))

    def _command(self, program: str, *arguments: str) -> None:
        with self._log.open("ab") as log:  # the server's own output too: a pipe would stay open with it
            command = [str(BINARIES / program), *arguments]
            done = subprocess.run(
                command, stdout=log, stderr=log, cwd="/", user=self._user, group=self._user, timeout=60
            )
        assert done.returncode == 0, self._log.read_text(encoding="utf-8")

    def start(self) -> None:
        """Starts the server and waits until it takes connections."""
        # Processes are killed here, never the machine: what they have written need not be on the disk.
        settings = (
            f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories= -c fsync=off"
        )
        self._command("pg_ctl", "-D", str(self._data), "-w", "-o", settings, "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stops the server; `immediate` is a crash, from which the next start recovers."""
        self._command("pg_ctl", "-D", str(self._data), "-w", "-m", mode, "stop")

    def restart(self) -> None:
        """A crash, and the server again."""
        self.stop()
        self.start()

    @property
    def is_running(self) -> bool:
        return (self._data / "postmaster.pid").exists()

    def url(self, database: str, port: int | None = None) -> str:
        """A database's URL, without the password."""
        return f"postgresql+psycopg://{ROLE}@127.0.0.1:{port or self.port}/{database}"

    def sql(self, statement: str, database: str = "postgres") -> None:
        """Executes one statement outside any transaction."""
        address = f"host=127.0.0.1 port={self.port} user={ROLE} dbname={database} passfile={self.passwords}"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(statement.encode())

    def create(self) -> str:
        """A new empty database; returns its URL."""
        name = f"ledger_{secrets.token_hex(4)}"
        self.sql(f"CREATE DATABASE {name}")
        return self.url(name)


class Wire:
    """A way to PostgreSQL that can be cut at a statement: just before it passes, or after it is done.

    Args:
        port: Where PostgreSQL is.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._words, self._moment = b"", ""
        self.port = int(self._listener.getsockname()[1])
        self.cuts = 0

    def __enter__(self) -> Wire:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def cut(self, moment: str, words: bytes = b"COMMIT\0") -> None:
        """Cuts the connection that sends a statement with these words next, `before` it passes or `after`."""
        self._words, self._moment = words, moment

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                client = self._listener.accept()[0]
                threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._server)) as server:
            while True:
                source = select.select([client, server], [], [])[0][0]
                data = source.recv(65536)
                if self._moment and self._words in data:
                    moment, self._moment = self._moment, ""
                    self.cuts += 1
                    if moment == "after":
                        server.sendall(data)
                        server.recv(65536)
                    return
                if not data:
                    return
                (server if source is client else client).sendall(data)
