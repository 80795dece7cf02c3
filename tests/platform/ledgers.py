"""Ledgers under test: a run's columns, an old schema, what is read back, and many processes at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from piste.ledger import Ledger, LedgerError, number
from piste.ledger.tables import Base

COLUMNS: dict[str, Any] = {
    "recipe": "r",
    "workload": "w",
    "seed": 0,
    "config": {},
    "provenance": {},
    "identity": "i",
    "cell": "c",
    "directory": "d",
}


def recorded(ledger: Ledger, run_id: str = "run") -> list[tuple[str, int, float, int]]:
    return [(m.key, m.step, number(m), m.timestamp) for m in ledger.metrics_after(run_id, 0, 10**6)]


def refused(act: Callable[[], object], *words: str) -> None:
    with pytest.raises(LedgerError) as caught:
        act()
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


VERSION_1 = """
CREATE TABLE meta ("key" VARCHAR NOT NULL, value VARCHAR NOT NULL, PRIMARY KEY ("key"));
CREATE TABLE runs (
    id VARCHAR NOT NULL, recipe VARCHAR NOT NULL, workload VARCHAR NOT NULL, seed INTEGER NOT NULL,
    config JSON NOT NULL, provenance JSON NOT NULL, identity VARCHAR NOT NULL, cell VARCHAR NOT NULL,
    directory VARCHAR NOT NULL, status VARCHAR NOT NULL, attempt INTEGER NOT NULL, driver VARCHAR,
    created DOUBLE PRECISION NOT NULL, finished DOUBLE PRECISION, error VARCHAR,
    recomputed_different INTEGER NOT NULL, PRIMARY KEY (id)
);
CREATE TABLE metrics (
    id INTEGER NOT NULL, run_id VARCHAR NOT NULL, "key" VARCHAR NOT NULL, step BIGINT NOT NULL,
    value DOUBLE PRECISION, special VARCHAR, timestamp BIGINT NOT NULL, PRIMARY KEY (id),
    UNIQUE (run_id, "key", step), FOREIGN KEY(run_id) REFERENCES runs (id)
);
INSERT INTO meta VALUES ('schema_version', '1');
INSERT INTO runs VALUES (
    'old', 'r', 'quadratic', 0, '{}', '{"code_version": "c"}', 'i', 'c', '/nowhere', 'failed', 1, NULL,
    1.0, 2.0, 'why', 0
);
INSERT INTO metrics (run_id, "key", step, value, timestamp) VALUES ('old', 'loss', 3, 0.5, 7);
"""


def make_old(ledger: Ledger) -> None:
    """Puts the tables of schema 1, with a run, in place of a ledger's own."""
    with ledger.engine.begin() as plain:
        Base.metadata.drop_all(plain)
        for statement in VERSION_1.split(";\n"):
            if plain.dialect.name == "postgresql":
                statement = statement.replace("id INTEGER", "id BIGSERIAL")
            plain.exec_driver_sql(statement)


TOGETHER = """
import os, resource, sys
from piste.ledger import Ledger, LedgerError, Message, Row

URL = sys.argv[1]
COLUMNS = dict.fromkeys(("recipe", "workload", "identity", "cell", "directory"), "x")
COLUMNS |= {"seed": 0, "config": {}, "provenance": {}}

def together(count, act):
    gate, starter = os.pipe()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            os.close(starter)
            os.read(gate, 1)  # ends when the parent closes its end: all start at once
            try:
                act(number)
                os._exit(0)
            except BaseException as error:
                print(type(error).__name__, error, file=sys.stderr, flush=True)
                os._exit(1)
        children.append(child)
    os.close(gate), os.close(starter)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count
"""


def together(ledger_url: str, script: str) -> subprocess.Popen[str]:
    """Starts a process of many: the script calls `together(count, act)`, and URL is the ledger's."""
    command = [sys.executable, "-W", "error", "-c", TOGETHER + script, ledger_url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
