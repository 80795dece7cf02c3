"""A run on the command line, followed to its end: what is said when it does not finish."""

from __future__ import annotations

import sys

from piste import running
from piste.errors import BadInput, PisteError, Terminated
from piste.ledger import Ledger
from piste.running import Observer, RunResult


def to_the_end(ledger: Ledger, run_id: str, local: bool, observer: Observer, kind: str = "run") -> RunResult:
    """Executes a run; says how to resume it where it does not finish.

    Args:
        ledger: The ledger that has it.
        run_id: The run.
        local: In this process, without Ray.
        observer: Shows progress.
        kind: What the first line calls it.
    """
    print(f"{kind} {run_id}", file=sys.stderr)
    resume = f"piste resume {run_id}" + (" --local" if local else "")
    said = len(running.log_lines(ledger, run_id))
    try:
        result = running.execute(ledger, run_id, local=local, observer=observer)
    except KeyboardInterrupt:
        print(f"piste: interrupted; `{resume}` continues it", file=sys.stderr)
        raise
    except BadInput:
        raise
    except PisteError as error:
        raise PisteError(f"{run_id} failed: {error}") from error
    finally:
        for line in running.log_lines(ledger, run_id)[said:]:
            print(f"piste: {line}", file=sys.stderr)
    if result.status == "interrupted":
        print(f"piste: stopped; `{resume}` continues it", file=sys.stderr)
    if result.pending != 0:
        shown = "some" if result.pending is None else result.pending
        print(f"piste: MLflow still lacks {shown} rows: `piste sync {run_id}` pushes them", file=sys.stderr)
    return result


def exit_code(result: RunResult) -> int:
    """Of a command whose last run is this one."""
    return Terminated.exit_code if result.status == "interrupted" else 0
