"""What a job executes on the cluster: a command of piste, and its end in the ledger."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from piste.catalog import unpacked_folder
from piste.cli import main
from piste.errors import Terminated
from piste.ledger import open_ledger

ENDS = {0: "succeeded", 130: "stopped", Terminated.exit_code: "stopped"}


def drive(job_id: str, command: Sequence[str]) -> int:
    """Runs the command; returns its exit code.

    Args:
        job_id: The job's id in the ledger.
        command: The words after `piste`.
    """
    ledger = open_ledger()
    ledger.jobs.set_status(job_id, "running")
    if command[0] == "study":
        ledger.jobs.set_subject(job_id, command[1])
    if (folder := unpacked_folder()) is not None:
        os.chdir(folder)  # the recipe's path is relative to it
    code = main(command)
    status = ENDS.get(code, "failed")
    ledger.jobs.set_status(job_id, status, f"exit code {code}" if status == "failed" else None)
    return code


if __name__ == "__main__":
    sys.exit(drive(os.environ["PISTE_JOB"], sys.argv[1:]))
