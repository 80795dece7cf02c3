"""`piste sweep` and `piste compare --sweep`: what they do and print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from piste import running, sweeping, tracking
from piste.dry_run import dry_run
from piste.errors import BadInput, PisteError, Terminated
from piste.home import home
from piste.ledger import Ledger, open_ledger
from piste.sweep_reporting import (
    Budgets,
    SweepJsonLines,
    SweepProgress,
    draw_all,
    print_dry_run,
    tables,
)


def execute(options: argparse.Namespace, fields: dict[str, Any]) -> int:
    """Plans, runs or continues a sweep; returns the exit code."""
    ledger = open_ledger()
    if options.resume is not None:
        if options.dry_run:
            raise BadInput("--dry-run goes with a recipe, not with --resume")
        if options.extend < 0:
            raise BadInput(f"--extend {options.extend}: a sweep never gets fewer trials")
        sweep_id = sweeping.resumable_sweep(ledger, options.resume, options.extend, fields)
    else:
        fields |= running.ONE_WORKER if options.local else {}
        name, config = Path(options.recipe).stem, running.load_recipe(options.recipe, fields)
        if options.dry_run:
            plan = dry_run(ledger, name, config, local=options.local, fresh=options.fresh)
            print_dry_run(plan, options.json)
            return 0
        sweep_id = sweeping.plan_sweep(ledger, name, config)
    print(f"sweep {sweep_id}", file=sys.stderr)
    resume = f"piste sweep --resume {sweep_id}" + (" --local" if options.local else "")
    try:
        result = sweeping.execute_sweep(
            ledger,
            sweep_id,
            local=options.local,
            fresh=options.fresh,
            observer=SweepJsonLines() if options.json else SweepProgress(Console(stderr=True)),
        )
    except KeyboardInterrupt:
        print(f"piste: interrupted; `{resume}` continues it", file=sys.stderr)
        raise
    except BadInput:
        raise
    except PisteError as error:
        raise PisteError(f"{sweep_id} failed: {error}: `{resume}` continues it") from error
    if result.status == "interrupted":
        print(f"piste: stopped; `{resume}` continues it", file=sys.stderr)
        return Terminated.exit_code
    if result.reason:
        print(f"piste: stopped by {result.reason}", file=sys.stderr)
    if result.pending != 0:
        shown = "some" if result.pending is None else result.pending
        print(f"piste: MLflow still lacks {shown} trials: `piste sync` pushes them", file=sys.stderr)
    report(ledger, sweep_id, options.json)
    return 0


def report(ledger: Ledger, sweep_id: str, as_json: bool, budgets: Budgets = "all") -> None:
    """Tables, pictures and the line that opens the user interface."""
    result = sweeping.sweep_result(ledger, sweep_id)
    found, shown = tables(ledger, result.trials, result.section, budgets)
    if as_json:
        print(json.dumps({"sweep": result.id, "status": result.status, "reason": result.reason, **found}))
        return
    folder = home() / "pictures" / result.id
    folder.mkdir(parents=True, exist_ok=True)
    draw_all(ledger, result.trials, result.section, folder)
    console = Console()
    for part in shown:
        console.print(part)
    uri = tracking.tracking_uri(ledger.sweeps.get(sweep_id).config["tracking"]["uri"])
    console.print(f"pictures      {os.path.relpath(folder)}", soft_wrap=True, highlight=False)
    address = tracking.sweep_address(uri, result.id)
    console.print(f"open MLflow   piste ui   # {address}", soft_wrap=True, highlight=False)
