"""Jobs: commands that were sent to a Ray cluster, kept here because Ray forgets them with its head."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import delete, select, update

from piste.errors import BadInput
from piste.ledger.database import Database
from piste.ledger.faults import repeats_lost_calls
from piste.ledger.tables import ACTIVE, Job, Run, Sweep

ENDED = ("succeeded", "failed", "stopped", "lost")
_GOING = ("planned", "sent", "running")


@repeats_lost_calls
class Jobs:
    """Reads and writes jobs.

    Args:
        database: The ledger's database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, **columns: Any) -> Job:
        """Records a planned job; arguments are columns of `Job`.

        Returns:
            What the ledger has under that id: this job, or the one that was there before.
        """
        planned = self._database.insert(Job).values(status="planned", created=time.time(), **columns)
        with self._database.writing() as connection:
            connection.execute(planned.on_conflict_do_nothing(index_elements=["id"]))
        return self.get(columns["id"])

    def set_status(self, job_id: str, status: str, error: str | None = None) -> None:
        """Takes a job further; none goes back, and one that has ended stays so, whatever a cluster says."""
        before = _GOING if status in ENDED else _GOING[: _GOING.index(status)]
        ended = time.time() if status in ENDED else None
        values = {"status": status, "error": error, "finished": ended}
        with self._database.writing() as connection:
            connection.execute(update(Job).where(Job.id == job_id, Job.status.in_(before)).values(values))

    def set_subject(self, job_id: str, subject: str) -> None:
        """Says which run, sweep or study a job's driver has made; the first stays."""
        with self._database.writing() as connection:
            fresh = update(Job).where(Job.id == job_id, Job.subject.is_(None))
            connection.execute(fresh.values(subject=subject))

    def forget(self, job_id: str) -> None:
        """Removes a job that was never sent."""
        with self._database.writing() as connection:
            connection.execute(delete(Job).where(Job.id == job_id, Job.status == "planned"))

    def release(self, subject: str, reason: str) -> None:
        """Marks the run or sweep that a dead driver has left open as interrupted, with its open runs."""
        values = {"status": "interrupted", "error": reason, "finished": time.time()}
        with self._database.writing() as connection:
            for table in (Run, Sweep):
                left = update(table).where(table.id == subject, table.status.in_(ACTIVE))
                connection.execute(left.values(values))
            left = update(Run).where(Run.sweep_id == subject, Run.status.in_(ACTIVE))
            connection.execute(left.values(**values, started=None))

    def get(self, job_id: str) -> Job:
        """The job of that id, or the only one whose id begins so.

        Raises:
            BadInput: No job, or several jobs, have it.
        """
        found = self._database.beginning(Job, job_id)
        if len(found) != 1:
            count = "no job has" if not found else "several jobs begin with"
            raise BadInput(f"{count} id {job_id!r}; `piste jobs` shows them")
        return found[0]

    def newest(self, limit: int | None = None) -> list[Job]:
        """The newest jobs first."""
        with self._database.session() as session:
            return list(session.scalars(select(Job).order_by(Job.created.desc()).limit(limit)))
