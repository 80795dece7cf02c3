"""`piste submit` and `piste jobs`: what they do and print."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from piste import catalog, jobs, shipping
from piste.clusters import connect
from piste.config import Resources
from piste.errors import BadInput, PisteError
from piste.home import home, keep
from piste.ledger import Job, Ledger, open_ledger
from piste.ledger.jobs import ENDED

INTERRUPTED = 130


def submit(options: argparse.Namespace, asked: argparse.Namespace, fields: dict[str, Any]) -> int:
    """Sends a command to a cluster and follows it; returns the job's exit code.

    Args:
        options: Those of `piste submit`; `words` is the command.
        asked: The command's own options.
        fields: The recipe's fields among them.

    Raises:
        BadInput: The command, its recipe or the cluster is not what it should be; nothing was sent.
        PisteError: The job failed or was lost.
    """
    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if address is None:
        raise BadInput("name the cluster's dashboard: --address http://HOST:8265, or RAY_API_SERVER_ADDRESS")
    cluster = connect(address)
    ledger = open_ledger()
    words, resources, name = list(options.words), Resources(), ""
    folder = Path(options.folder) if options.folder is not None else None
    if (recipe := _recipe(asked)) is not None:
        if (path := catalog.recipe_path(recipe)) == Path(recipe):
            folder = folder or path.parent
            words[words.index(recipe)] = _inside(path, folder)
        resources, name = _validated(recipe, asked.command, fields, folder), Path(recipe).stem
    elif asked.command == "resume" or asked.command == "sweep":
        name, resources = _continued(ledger, asked)
    else:
        from piste.studies import load_study

        for name in asked.studies:
            load_study(name)
    if getattr(asked, "local", False):
        options.driver_cpus = options.driver_cpus or float(resources.cpus_per_worker)
        resources = resources.model_copy(update={"workers": 0})
    job = jobs.submit(
        ledger,
        cluster,
        words,
        job_id=options.id or f"{asked.command}-{name}-{secrets.token_hex(3)}",
        resources=resources,
        folder=folder,
        python=options.python,
        driver_cpus=options.driver_cpus,
        tell=lambda line: print(f"piste: {line}", file=sys.stderr),
    )
    if options.json:
        print(json.dumps(_row(job)))
        return 0
    if cluster.mode == "disabled":
        print(f"piste: {address} takes jobs from anyone: it asks for no token", file=sys.stderr)
    print(f"job {job.id}", file=sys.stderr)
    if not options.follow:
        print(f"piste: `piste jobs logs -f {job.id}` follows it", file=sys.stderr)
        return 0
    return _follow(ledger, job)


def _recipe(asked: argparse.Namespace) -> str | None:
    if asked.command == "run":
        if len(asked.recipes) != 1:
            raise BadInput("a job runs one recipe: submit each by itself")
        return str(asked.recipes[0])
    if asked.command == "stream" and (asked.recipe is None or asked.watch is not None):
        raise BadInput(
            "a job follows the streams of a recipe: run `piste stream --watch` where the ledger is"
        )
    return getattr(asked, "recipe", None) if asked.command in {"sweep", "stream"} else None


def _validated(recipe: str, command: str, fields: dict[str, Any], folder: Path | None) -> Resources:
    """The resources of a recipe that is valid.

    What was found valid is remembered, with all that decides it: to find it out takes the import of torch.

    Raises:
        BadInput: It is not, or has no `[sweep]` to be swept.
    """
    facts = [recipe, command, fields, shipping.content(folder), sys.version, version("torch")]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    known = home() / "valid" / f"{key}.json"
    if known.exists():
        return Resources.model_validate_json(known.read_bytes())
    from piste.running import load_recipe

    config = load_recipe(recipe, fields)
    if command == "sweep" and config.sweep is None:
        raise BadInput(f"{recipe} has no [sweep]: nothing to search")
    if command == "stream":
        from piste.streams import check

        check(recipe, config)
    if config.resources.address is not None:
        raise BadInput("resources.address: a job computes on the cluster that it is sent to: leave it out")
    keep(known, config.resources.model_dump_json())
    return config.resources


def _inside(path: Path, folder: Path) -> str:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        raise BadInput(f"{path} is not in {folder}, the folder that the job takes along") from None


def _continued(ledger: Ledger, asked: argparse.Namespace) -> tuple[str, Resources]:
    """The name and resources of a run or sweep that is to be continued.

    Raises:
        BadInput: There is none of that id, or another job is at work on it.
    """
    if asked.command == "sweep" and asked.resume is None:
        raise BadInput("name a recipe, or a sweep with --resume")
    row = ledger.sweeps.get(asked.resume) if asked.command == "sweep" else ledger.run(asked.run)
    at_work = [job for job in ledger.jobs.newest() if job.subject == row.id and job.status not in ENDED]
    for job in jobs.refreshed(ledger, at_work):
        if job.status not in ENDED:
            raise BadInput(f"{row.id} is in the hands of job {job.id}: `piste jobs stop {job.id}` ends that")
    return row.id, Resources.model_validate(row.config["resources"])


def show(options: argparse.Namespace) -> int:
    """`piste jobs`: all of them, or what is asked of one; returns the exit code."""
    ledger = open_ledger()
    if options.action is None:
        found = jobs.refreshed(ledger, ledger.jobs.newest(limit=50))
        if options.json:
            print(json.dumps({"jobs": [_row(job) for job in found]}))
            return 0
        from piste.reporting import age

        print(f"jobs in {ledger.name}")
        for job in found:
            subject, error = job.subject or "", job.error or ""
            print(f"  {job.id:<28} {job.status:<10} {age(job.created):<12} {subject}  {error}")
        return 0
    if options.job is None:
        raise BadInput(f"name a job: piste jobs {options.action} ID")
    job = ledger.jobs.get(options.job)
    if options.action == "status":
        [job] = jobs.refreshed(ledger, [job])
        _print_status(job, options.json)
        return 0
    if options.action == "stop":
        return _stop(ledger, job)
    if options.follow:
        return _follow(ledger, job)
    print(connect(job.address).client.get_job_logs(job.id), end="")
    return 0


def _stop(ledger: Ledger, job: Job) -> int:
    if job.status == "planned":
        ledger.jobs.set_status(job.id, "stopped")
    elif job.status not in ENDED:
        job = jobs.stop(ledger, job, connect(job.address))
    _print_status(ledger.jobs.get(job.id), False)
    return 0


def _follow(ledger: Ledger, job: Job) -> int:
    """Shows a job's log to its end; returns its exit code.

    Raises:
        PisteError: It failed or was lost.
    """
    cluster = connect(job.address)
    broken: PisteError | None = None
    try:
        jobs.follow(cluster, job.id, lambda text: print(text, end="", flush=True))
    except PisteError as error:
        broken = error
    except KeyboardInterrupt:
        print(f"\npiste: {job.id} goes on; `piste jobs stop {job.id}` ends it", file=sys.stderr)
        raise
    [job] = jobs.refreshed(ledger, [ledger.jobs.get(job.id)])
    resume = f": `{command}` goes on" if (command := jobs.resume_command(job)) else ""
    if job.status not in ENDED:
        raise PisteError(
            f"{broken or 'the log has ended'}; {job.id} was {job.status}: `piste jobs` asks again"
        )
    if job.status in {"failed", "lost"}:
        raise PisteError(f"job {job.id} {job.status}: {job.error}{resume}")
    if job.status == "stopped":
        print(f"piste: job {job.id} was stopped{resume}", file=sys.stderr)
        return INTERRUPTED
    print(f"piste: job {job.id} succeeded", file=sys.stderr)
    return 0


def _row(job: Job) -> dict[str, Any]:
    """A job for a machine to read."""
    keys = ("id", "status", "subject", "address", "created", "finished", "error")
    return {key: getattr(job, key) for key in keys} | {"resume": jobs.resume_command(job)}


def _print_status(job: Job, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_row(job)))
        return
    command: Sequence[str] = job.request["command"]
    facts = {
        "job": job.id,
        "status": job.status + (f" ({job.error})" if job.error else ""),
        "command": f"piste {' '.join(command)}",
        "cluster": job.address,
        "made": job.subject or "nothing yet",
        "go on with": jobs.resume_command(job) or "",
    }
    for key, value in facts.items():
        if value:
            print(f"{key:<12}{value}")
