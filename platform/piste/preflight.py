"""What is refused before anything starts: resources that are not there, storage that not all hosts see."""

from __future__ import annotations

import os

from piste.config import Resources
from piste.errors import BadInput


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_resources(resources: Resources) -> None:
    """Checks a recipe that names no cluster against this machine.

    Raises:
        BadInput: With the numbers asked for and at hand.
    """
    if resources.address is not None or os.environ.get("RAY_ADDRESS"):
        return
    asked = resources.workers * resources.cpus_per_worker
    if asked > cpus():
        raise BadInput(
            f"resources: {resources.workers} workers x {resources.cpus_per_worker} CPUs = {asked} CPUs, "
            f"but this machine has {cpus()}: lower resources.workers or name a cluster in resources.address"
        )
    wanted = resources.workers * resources.gpus_per_worker
    if wanted > 0:
        import torch

        if wanted > torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise BadInput(
                f"resources: {resources.workers} workers x {resources.gpus_per_worker:g} = {wanted:g} GPUs, "
                f"but this machine has {found}: lower resources.gpus_per_worker or name a cluster"
            )


def check_hosts(nodes: int, resources: Resources, ledger_url: str, tracking_uri: str) -> None:
    """Refuses several hosts with a ledger or a tracking store that only one of them can see.

    Raises:
        BadInput: With what is lacking.
    """
    if nodes == 1 or resources.one_host:
        return
    lacking = []
    if ledger_url.startswith("sqlite"):
        lacking.append("a ledger in PostgreSQL (PISTE_LEDGER=postgresql+psycopg://...)")
    if not tracking_uri.startswith("http"):
        lacking.append("an MLflow server (MLFLOW_TRACKING_URI=http://...)")
    if lacking:
        raise BadInput(
            f"the cluster has {nodes} nodes: a run on several hosts needs {' and '.join(lacking)}, and "
            "PISTE_HOME on storage that all of them share; if all nodes are this host, set "
            "resources.one_host = true"
        )
