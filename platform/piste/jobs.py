"""Jobs: a command of piste sent to a Ray cluster, followed, stopped, and remembered when Ray forgets it.

The ledger has a job before Ray has it, under the same id, so that a submission may be repeated until it
has arrived and is never there twice. What a job's driver has recorded of its end counts more than what a
cluster says of it: Ray loses all jobs with its head.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from piste import cluster_preflight, shipping, tracking
from piste.clusters import Cluster, connect
from piste.config import Resources
from piste.errors import BadInput, PisteError
from piste.home import home
from piste.ledger import Job, Ledger, without_password
from piste.ledger.jobs import ENDED

END_SECONDS = 10.0  # beyond a run's own grace period, for its driver to end
SEND_SECONDS = 60.0
FROM_RAY = {
    "PENDING": "sent",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


def submit(
    ledger: Ledger,
    cluster: Cluster,
    command: Sequence[str],
    *,
    job_id: str,
    resources: Resources,
    folder: Path | None = None,
    python: str = sys.executable,
    driver_cpus: float = 0.0,
    tell: Callable[[str], None] = print,
) -> Job:
    """Sends a command to a cluster, once.

    Args:
        ledger: Where the job is recorded; the cluster must reach the same.
        cluster: From `clusters.connect`.
        command: The words after `piste`, such as `["run", "llm-reg"]`.
        job_id: The job's id here and in Ray; the same command under the same id is one job.
        resources: What it computes on.
        folder: The user's folder, which the job takes along.
        python: The interpreter on the cluster.
        driver_cpus: CPUs that the command itself takes; none: it runs on the head.
        tell: Called with what a user should know and that does no harm.

    Returns:
        The job as the ledger has it; it may have been sent, or have ended, before.

    Raises:
        BadInput: The cluster cannot run it, or the id belongs to another command.
        PisteError: The cluster did not take it.
    """
    cluster_preflight.check_size(cluster, resources, driver_cpus)
    with tempfile.TemporaryDirectory(prefix="piste-") as temporary:
        shipment = shipping.pack(folder, Path(temporary))
        request = {
            "command": list(command),
            "python": python,
            "driver_cpus": driver_cpus,
            "grace_seconds": resources.grace_seconds,
            "settings": settings(ledger),
        }
        content = _content(request, shipment)
        columns = {"request": request, "content": content, "address": cluster.address}
        job = ledger.jobs.create(id=job_id, session=cluster.session, **columns)
        if job.content != content:
            raise BadInput(
                f"job {job_id} is there already, with {_difference(job, request)}: use another --id"
            )
        if job.status != "planned":
            return job
        try:
            for difference in cluster_preflight.check(cluster, job, resources):
                tell(difference)
        except BadInput:
            ledger.jobs.forget(job_id)
            raise
        _send(cluster, job, shipment)
    ledger.jobs.set_status(job_id, "sent")
    return ledger.jobs.get(job_id)


def settings(ledger: Ledger) -> dict[str, str]:
    """What a job is told of ledger, tracking server and storage; passwords are left behind.

    Where the ledger or the server asks for one, it comes from the cluster's own environment
    (`PGPASSFILE`, `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`).
    """
    return {
        "PISTE_HOME": str(home()),
        "PISTE_LEDGER": without_password(ledger.url)[0],
        "MLFLOW_TRACKING_URI": tracking.without_credentials(tracking.tracking_uri()),
    }


def _content(request: dict[str, Any], shipment: shipping.Shipment) -> str:
    text = json.dumps([request, shipment.folder, shipment.content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _difference(job: Job, request: dict[str, Any]) -> str:
    """In what an earlier job of the same id differs, in words."""
    different = [key for key in request if job.request.get(key) != request[key]]
    if "command" in different:
        return f"another command (piste {shlex.join(job.request['command'])})"
    return f"other {' and '.join(different).replace('_', ' ')}" if different else "other code"


def _send(cluster: Cluster, job: Job, shipment: shipping.Shipment) -> None:
    """Submits until Ray has the job: an answer may be lost on its way back.

    Raises:
        BadInput: Ray has another job of this id, from another ledger.
        PisteError: Ray does not take it.
    """
    environment = {
        **job.request["settings"],
        "PISTE_JOB": job.id,
        "RAY_AUTH_MODE": cluster.mode,
        "RAY_JOB_STOP_WAIT_TIME_S": f"{job.request['grace_seconds'] + END_SECONDS:.0f}",
    }
    if shipment.folder is not None:
        environment["PISTE_FOLDER"] = shipment.folder
    command = [job.request["python"], "-m", "piste.job_driver", *job.request["command"]]
    deadline = time.monotonic() + SEND_SECONDS
    while True:
        try:
            cluster.client.submit_job(
                submission_id=job.id,
                entrypoint=shlex.join(command),
                runtime_env={"py_modules": [str(path) for path in shipment.modules], "env_vars": environment},
                metadata={"piste": job.content},
                entrypoint_num_cpus=job.request["driver_cpus"] or None,
            )
            return
        except Exception as error:  # the client raises RuntimeError, requests' and aiohttp's own
            line = str(error).strip().splitlines()[-1 if "Traceback" in str(error) else 0]
            known = _info(cluster, job.id)
            if known is not None:
                if (known.metadata or {}).get("piste") != job.content:
                    raise BadInput(f"job {job.id} is on the cluster already: use another --id") from None
                return
            if "No available agent" not in line or time.monotonic() > deadline:
                raise PisteError(f"the cluster at {cluster.address} did not take the job: {line}") from error
            time.sleep(0.5)  # the cluster has just started


def _info(cluster: Cluster, job_id: str) -> Any:
    """What Ray knows of a job; None where it knows none of that id.

    Raises:
        PisteError: It does not answer.
    """
    try:
        return cluster.client.get_job_info(job_id)
    except RuntimeError as error:
        if "does not exist" in str(error):
            return None
        raise PisteError(f"the cluster at {cluster.address}: {str(error).strip().splitlines()[0]}") from error
    except OSError as error:
        raise PisteError(f"the cluster at {cluster.address} does not answer: {error}") from error


def reconcile(ledger: Ledger, job: Job, cluster: Cluster) -> Job:
    """Brings the ledger's record of a job up to what its cluster knows.

    A job that the cluster does not know is lost: its head was replaced, or has been told to forget it. What
    such a job was working on is marked interrupted, and can be resumed.
    """
    if job.status in ENDED or job.status == "planned":
        return job
    known = _info(cluster, job.id)
    why = "does not know it any more" if job.session == cluster.session else "has another head"
    status, error = "lost", f"the cluster at {cluster.address} {why}"
    if known is not None:
        status = FROM_RAY[known.status.value]
        error = str(known.message or "").strip().partition("\n")[0] if status == "failed" else ""
    if status != job.status:
        ledger.jobs.set_status(job.id, status, error or None)
        job = ledger.jobs.get(job.id)  # the driver may have been first
    if job.status in {"failed", "stopped", "lost"} and job.subject is not None:
        ledger.jobs.release(job.subject, f"its job {job.id} has ended: {job.status}")
    return job


def refreshed(ledger: Ledger, jobs: Sequence[Job]) -> list[Job]:
    """The jobs as their clusters know them; those of a cluster that does not answer as the ledger does."""
    clusters: dict[str, Cluster | None] = {}
    found = []
    for job in jobs:
        if job.status not in {*ENDED, "planned"}:
            if job.address not in clusters:
                clusters[job.address] = _connected(job.address)
            if (cluster := clusters[job.address]) is not None:
                job = reconcile(ledger, job, cluster)
        found.append(job)
    return found


def _connected(address: str) -> Cluster | None:
    try:
        return connect(address)
    except BadInput:
        return None


def follow(cluster: Cluster, job_id: str, show: Callable[[str], None]) -> None:
    """Shows a job's log until the job ends or the cluster is gone."""

    async def tail() -> None:
        async for text in cluster.client.tail_job_logs(job_id):
            show(text)

    try:
        asyncio.run(tail())
    except (OSError, RuntimeError, ConnectionError) as error:
        raise PisteError(f"the log of {job_id} broke off: {str(error).strip().splitlines()[0]}") from error


def stop(ledger: Ledger, job: Job, cluster: Cluster) -> Job:
    """Asks a job to end: its run keeps a checkpoint; what has not ended within the grace period is killed."""
    if _info(cluster, job.id) is not None:
        cluster.client.stop_job(job.id)
    seconds = job.request["grace_seconds"] + 3 * END_SECONDS
    deadline = time.monotonic() + seconds
    while (job := reconcile(ledger, job, cluster)).status not in ENDED:
        if time.monotonic() > deadline:
            raise PisteError(f"{job.id} has not ended after {seconds:.0f} s")
        time.sleep(0.2)
    return job


def resume_command(job: Job) -> str | None:
    """The words that go on where a job has stopped; None where there is nothing to go on with."""
    verb = job.request["command"][0]
    if job.subject is None or job.status in {"succeeded", "planned", "sent", "running"}:
        return None
    words = {"sweep": f"sweep --resume {job.subject}", "study": f"study {job.subject}"}
    return f"piste submit {words.get(verb, f'resume {job.subject}')} --address {job.address}"
