"""What is refused before anything is sent to a cluster: too few resources, other versions, no ledger.

The cluster is asked by a small job of its own that carries nothing (`probe`). The answer holds for as long
as the cluster has the same nodes and the question is the same, and is kept for an hour.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import secrets
import shlex
import time
from pathlib import Path
from typing import Any

from piste import probe
from piste.clusters import Cluster
from piste.config import Resources
from piste.errors import BadInput
from piste.home import home, keep
from piste.ledger import Job
from piste.preflight import check_hosts
from piste.provenance import LIBRARIES

PROBE_SECONDS = 90.0
FRESH_SECONDS = 3600.0
ALIKE = ("ray",)  # of another version on the two sides, it does not work at all
SHIPPED = ("piste",)  # travels with the job


def check_size(cluster: Cluster, resources: Resources, driver_cpus: float) -> None:
    """Refuses a recipe that needs more than the cluster has.

    Raises:
        BadInput: With the numbers.
    """
    asked = {
        "CPUs": (resources.workers * resources.cpus_per_worker + driver_cpus, cluster.cpus),
        "GPUs": (resources.workers * resources.gpus_per_worker, cluster.gpus),
    }
    for kind, (wanted, there) in asked.items():
        if wanted > there:
            raise BadInput(
                f"resources: the job needs {wanted:g} {kind}, the cluster at {cluster.address} has "
                f"{there:g}: lower resources.workers or what each takes"
            )


def check(cluster: Cluster, job: Job, resources: Resources) -> list[str]:
    """Asks the cluster for its versions and for its way to ledger, tracking server and storage.

    Returns:
        Differences that do no harm, a line each.

    Raises:
        BadInput: It cannot run the job.
    """
    settings = job.request["settings"]
    check_hosts(len(cluster.nodes), resources, settings["PISTE_LEDGER"], settings["MLFLOW_TRACKING_URI"])
    libraries = [name for name in LIBRARIES if name not in SHIPPED]
    here = {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in libraries}}
    facts = [cluster.nodes, job.request["python"], settings, here]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    kept = home() / "clusters" / f"{key}.json"
    answers = _kept(kept)
    if answers is None:
        question = {
            "libraries": libraries,
            "ledger": settings["PISTE_LEDGER"],
            "tracking": settings["MLFLOW_TRACKING_URI"],
            "home": settings["PISTE_HOME"],
            "job": job.id,
            "token": f".probe-{secrets.token_hex(4)}",
            "nodes": len(cluster.nodes),
        }
        answers = _ask(cluster, job.request["python"], question)
        differences = compare(here, answers)
        keep(kept, json.dumps(answers))
        return differences
    return compare(here, answers)


def _kept(path: Path) -> list[dict[str, Any]] | None:
    """An earlier answer, unless it is old or unreadable."""
    try:
        if time.time() - path.stat().st_mtime < FRESH_SECONDS:
            answers: list[dict[str, Any]] = json.loads(path.read_text())
            return answers
    except (OSError, ValueError):
        pass
    return None


def _ask(cluster: Cluster, python: str, question: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs the probe on the cluster.

    Raises:
        BadInput: It gives no answer.
    """
    name = f"piste-probe-{secrets.token_hex(4)}"
    program = "import os; exec(os.environ['PISTE_PROBE'])"
    cluster.client.submit_job(
        submission_id=name,
        entrypoint=shlex.join([python, "-c", program]),
        runtime_env={
            "env_vars": {
                "PISTE_PROBE": Path(probe.__file__).read_text(encoding="utf-8"),
                "PISTE_PROBE_QUESTION": json.dumps(question),
                "RAY_AUTH_MODE": cluster.mode,
            }
        },
    )
    deadline = time.monotonic() + PROBE_SECONDS
    while not (status := cluster.client.get_job_status(name)).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.05)
    log = cluster.client.get_job_logs(name)
    for line in log.splitlines():
        if line.startswith(probe.MARK):
            cluster.client.delete_job(name) if status.is_terminal() else cluster.client.stop_job(name)
            answers: list[dict[str, Any]] = json.loads(line.removeprefix(probe.MARK))
            return answers
    if "not found" in log or "No such file" in log:
        raise BadInput(f"the cluster at {cluster.address} has no interpreter {python}: name it with --python")
    last = (log.strip().splitlines() or ["no output"])[-1]
    raise BadInput(f"the cluster at {cluster.address} does not say what it has (job {name}): {last}")


def compare(here: dict[str, str], answers: list[dict[str, Any]]) -> list[str]:
    """Compares the versions of both ends, host by host.

    Args:
        here: This end's version of Python and of each library.
        answers: From the probe, one a host.

    Returns:
        Differences that do no harm, a line each.

    Raises:
        BadInput: A difference that does, or something that a host cannot reach.
    """
    differences = []
    for answer in answers:
        host = answer["host"]
        if answer["python"].split(".")[:2] != here["python"].split(".")[:2]:
            raise BadInput(
                f"Python {answer['python']} on {host}, {here['python']} here: name another interpreter with "
                "--python, or submit from the same version"
            )
        for name, version in answer["versions"].items():
            if version is None:
                raise BadInput(f"{name} is not installed on {host} (here: {here[name]}): install it there")
            if version != here[name]:
                difference = f"{name} {version} on {host}, {here[name]} here"
                if name in ALIKE:
                    raise BadInput(f"{difference}: install the same on both")
                differences.append(difference)
        if answer["problems"]:
            raise BadInput(f"from {host}: {answer['problems'][0]}")
    return differences
