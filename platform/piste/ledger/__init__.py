"""The ledger: every job, sweep, run, metric, artifact and checkpoint, in SQL. The ledger is the truth.

One writer per driver applies messages `(run, attempt, sequence, rows)` and acknowledges each after its
commit. Applying is idempotent: a row is inserted or ignored on `(run, key, step)`, so that a message
may be lost, doubled or late without a metric being lost or doubled. The first row keeps its value and
its timestamp; a recomputed row that differs is counted in `Run.recomputed_different`.
"""

from __future__ import annotations

from piste.ledger.database import default_url, without_password
from piste.ledger.faults import LedgerError
from piste.ledger.jobs import Jobs
from piste.ledger.migration import SCHEMA_VERSION
from piste.ledger.runs import Runs
from piste.ledger.streams import Streams
from piste.ledger.sweeps import Sweeps
from piste.ledger.tables import (
    WALL_CLOCK,
    Artifact,
    Job,
    Message,
    Metric,
    Row,
    Run,
    StoredRow,
    Sweep,
    TrialRecord,
    metric_columns,
    number,
    stored,
)

__all__ = [
    "SCHEMA_VERSION",
    "WALL_CLOCK",
    "Artifact",
    "Job",
    "Ledger",
    "LedgerError",
    "Message",
    "Metric",
    "Row",
    "Run",
    "StoredRow",
    "Sweep",
    "TrialRecord",
    "default_url",
    "metric_columns",
    "number",
    "open_ledger",
    "stored",
    "without_password",
]


class Ledger(Runs):
    """Reads and writes one ledger database: runs, `sweeps` with their trials, `jobs`, and `streams`.

    Args:
        url: SQLite, which is put into WAL mode, or PostgreSQL.
        patient: It was opened before, by another process: wait for it where it cannot be reached.

    Raises:
        LedgerError: It cannot be opened, is corrupt, or was written by a newer piste.
    """

    def __init__(self, url: str, patient: bool = False) -> None:
        super().__init__(url, patient)
        self.sweeps = Sweeps(self)
        self.jobs = Jobs(self)
        self.streams = Streams(self)


def open_ledger() -> Ledger:
    """The ledger in use."""
    return Ledger(default_url())
