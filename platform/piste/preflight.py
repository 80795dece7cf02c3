"""What is refused before Ray is even imported: resources that this machine cannot give."""

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
    if resources.address is not None:
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
