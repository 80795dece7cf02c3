"""The Ray nodes of a cluster: their command lines and what they are told by their environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.hosts import DEVICE
from infra.layout import HEAD, RAY_HOSTS, STORE, Layout

MEMORY = 4 * 2**30  # of each node: every one of them sees all of this machine's
OBJECT_STORE = 100 * 2**20
GRACE_SECONDS = 30
# A node that is silent is dead after threshold x (period + timeout) = 12 s at most.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
SETTINGS = {
    **HEALTH_CHECKS,
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",  # so long a node waits for a lost head
    "RAY_raylet_liveness_self_check_interval_ms": "2000",  # so soon a node sees that the head is a new one
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(GRACE_SECONDS),
    "RAY_memory_monitor_refresh_ms": "0",  # one node's processes would be killed for another's
    "RAY_enable_worker_prestart": "0",  # no idle Python processes
    "RAY_prestart_worker_first_driver": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# What a node takes from whoever starts the cluster, beside Ray's own settings.
KEPT = {"HOME", "LANG", "LD_LIBRARY_PATH", "LOGNAME", "OMP_NUM_THREADS", "PATH", "PYTHONPATH", "TZ", "USER"}
PLACE = "PISTE_CLUSTER_HOST"  # set in every process of a cluster, as CLUSTER/HOST


def shared(layout: Layout, host: str) -> dict[str, str]:
    """What every process on a host is told of the cluster; no password is among it."""
    told = {
        PLACE: f"{layout.name}/{host}",
        "PISTE_HOME": str(layout.folder / "home"),
        "PISTE_LEDGER": f"postgresql+psycopg://piste@{layout.at(STORE, 'postgres')}/ledger",
        "PGPASSFILE": str(layout.secrets / "postgres"),
        "MLFLOW_TRACKING_URI": f"http://{layout.at(STORE, 'mlflow')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(layout.secrets / "token"),
        "RAY_TMPDIR": str(layout.folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    device = DEVICE if layout.isolated else "lo"
    return told | dict.fromkeys(("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), device)


def of_node(layout: Layout, host: str, outside: Mapping[str, str]) -> dict[str, str]:
    """The environment of a host's services: settings of Ray in `outside` win over those shipped here."""
    theirs = {key: value for key, value in outside.items() if key in KEPT or _is_ray_setting(key)}
    return SETTINGS | theirs | _path(outside) | shared(layout, host)


def of_command(layout: Layout, host: str, outside: Mapping[str, str]) -> dict[str, str]:
    """The environment of a command that a user runs on a host: the user's, and the cluster's."""
    proxies = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy")
    theirs = {key: value for key, value in outside.items() if key.lower() not in proxies}
    theirs.pop("RAY_ADDRESS", None)
    told = {"RAY_API_SERVER_ADDRESS": f"http://{layout.at(HEAD, 'dashboard')}", "no_proxy": "*"}
    if host in RAY_HOSTS:
        told["RAY_ADDRESS"] = gcs(layout)
    return theirs | _path(outside) | told | shared(layout, host)


def _path(outside: Mapping[str, str]) -> dict[str, str]:
    """PATH with this interpreter's commands in front, whether its environment is activated or not."""
    return {"PATH": f"{Path(sys.executable).parent}:{outside.get('PATH', os.defpath)}"}


def _is_ray_setting(key: str) -> bool:
    others = ("RAY_AUTH_", "RAY_ADDRESS", "RAY_TMPDIR", "RAY_JOB")
    return key.startswith("RAY_") and not key.startswith(others)


def gcs(layout: Layout) -> str:
    """The address of the cluster for Ray's own processes."""
    return f"{layout.addresses[HEAD]}:{layout.ports['gcs']}"


def service(layout: Layout, host: str) -> dict[str, Any]:
    """A Ray node as the supervisor is told of it."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start"]
    command = [*start, *_role(layout, host), *_options(layout, host)]
    return {"name": "ray", "command": command, "heart": "/raylet/raylet "}


def _role(layout: Layout, host: str) -> list[str]:
    if host != HEAD:
        return [f"--address={gcs(layout)}"]
    listen = "0.0.0.0" if layout.isolated else layout.addresses[HEAD]
    ports = [f"--port={layout.ports['gcs']}", f"--dashboard-port={layout.ports['dashboard']}"]
    if not layout.isolated:
        ports += [f"--ray-client-server-port={layout.ports['client']}"]
    return ["--head", *ports, f"--dashboard-host={listen}"]


def _options(layout: Layout, host: str) -> list[str]:
    options = [
        "--block",
        "--disable-usage-stats",
        f"--node-ip-address={layout.addresses[host]}",
        f"--num-cpus={0 if host == HEAD else layout.cpus}",
        "--num-gpus=0",
        f"--memory={MEMORY}",
        f"--object-store-memory={OBJECT_STORE}",
        f'--resources={{"{host}": 1}}',
    ]
    if not layout.isolated:
        options += [f"--dashboard-agent-listen-port={layout.ports[host]}"]
        options += ["--min-worker-port=0", "--max-worker-port=0"]
    return options
