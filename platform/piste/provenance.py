"""Where a result comes from: code, data, libraries, machine; and the identity of a run.

The identity is a hash of all that decides a run's numbers; a *cell* is the identity without the seed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from piste import catalog
from piste.config import Recipe

LIBRARIES = ("piste", "torch", "ray", "mlflow", "sqlalchemy", "numpy", "tokenizers")


def code_version(packages: Iterable[str]) -> str:
    """sha256 over (relative path, bytes) of all Python files of the packages, in sorted order."""
    digest = hashlib.sha256()
    for package in sorted(set(packages)):
        spec = importlib.util.find_spec(package)
        locations = list(spec.submodule_search_locations or []) if spec else []
        single = Path(spec.origin) if spec and not locations and spec.origin else None
        files = [single] if single else sorted(p for root in locations for p in Path(root).rglob("*.py"))
        for path in files:
            root = next((Path(r) for r in locations if path.is_relative_to(r)), path.parent)
            digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def code_packages(config: Recipe) -> list[str]:
    """The top-level packages that provide a recipe's workload and optimizers."""
    workload = (
        config.workload if "." in config.workload else catalog.find("workloads", config.workload).module
    )
    optimizers = [catalog.load_optimizer(section.name).__module__ for section in config.optimizer.chain]
    return sorted(
        {module.partition(".")[0] for module in [workload, *optimizers]} - {"torch"} | {"piste_algorithms"}
    )


def identify(table: Mapping[str, Any], code: str, data: str) -> tuple[str, str]:
    """The identity of a run and of its cell.

    Args:
        table: The resolved recipe as JSON; `[tracking]`, `[sweep]` and `[resources]` do not count, but the
            world size does.
        code: From `code_version`.
        data: The data's hash.
    """
    decisive = {k: v for k, v in table.items() if k not in {"tracking", "resources", "seed", "sweep"}}
    decisive["world_size"] = table["resources"]["workers"]
    facts = [decisive, code, data, _version("torch")]
    cell = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return hashlib.sha256(f"{cell}/{table['seed']}".encode()).hexdigest(), cell


def collect(code: str, data: str) -> dict[str, Any]:
    """Everything about the origin of a run that a reader will ask for."""
    return {
        "code_version": code,
        "data_hash": data,
        "git": _git(),
        "python": platform.python_version(),
        "libraries": {name: v for name in LIBRARIES if (v := _version(name))},
        "hardware": _hardware(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def environment() -> str:
    """All installed distributions, as `name==version` lines."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


@cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    """Commit and dirty flag of the current folder's repository; empty outside one."""

    def ask(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _hardware() -> dict[str, Any]:
    import psutil
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), model)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "system": platform.system(),
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
    }
