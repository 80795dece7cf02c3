"""A Ray cluster as its dashboard shows it: what answers, with which token, how large it is."""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from piste.errors import BadInput

CONNECT_SECONDS = 5.0
_TALKATIVE = (  # of every package that is sent, of every connection that is closed
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
TOKEN_HELP = "set RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to the cluster's"


@dataclass(frozen=True)
class Cluster:
    """A cluster that answers.

    Attributes:
        address: Its dashboard, as `http://HOST:8265`.
        mode: How Ray knows its users: by a token, or not at all (`disabled`).
        client: Ray's job client.
        nodes: The ids of its live nodes, the head's first.
        cpus: All CPUs.
        gpus: All GPUs.
    """

    address: str
    mode: Literal["token", "disabled"]
    client: Any
    nodes: tuple[str, ...]
    cpus: float
    gpus: float

    @property
    def session(self) -> str:
        """Which life of the head this is."""
        return self.nodes[0]


def connect(address: str) -> Cluster:
    """Connects to a cluster's dashboard.

    Raises:
        BadInput: Nothing answers there, it is not Ray, or it wants another token.
    """
    address = address.rstrip("/")
    mode = _mode(address)
    os.environ |= {"RAY_AUTH_MODE": mode, "RAY_USAGE_STATS_ENABLED": "0"}  # explicit, whatever Ray's default
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
        found = list_nodes(address, detail=True, limit=10_000, timeout=30)
    except AuthenticationError as error:
        refused = "invalid" in str(error).lower()
        cause = "refuses the token that was found" if refused else "asks for a token, and none was found"
        raise BadInput(f"the Ray cluster at {address} {cause}: {TOKEN_HELP}") from None
    except (OSError, RuntimeError, RayStateApiException) as error:
        line = str(error).strip().partition("\n")[0]
        raise BadInput(f"the Ray cluster at {address} does not answer as it should: {line}") from None
    alive = sorted((n for n in found if n.state == "ALIVE"), key=lambda n: (not n.is_head_node, n.node_id))
    if not alive:
        raise BadInput(f"the Ray cluster at {address} has no live node yet: try again in a moment")
    totals = [node.resources_total for node in alive]
    return Cluster(
        address,
        mode,
        client,
        tuple(node.node_id for node in alive),
        sum(total.get("CPU", 0.0) for total in totals),
        sum(total.get("GPU", 0.0) for total in totals),
    )


def _mode(address: str) -> Literal["token", "disabled"]:
    """How the dashboard at an address knows its users.

    Raises:
        BadInput: There is none.
    """
    if urlsplit(address).scheme not in {"http", "https"} or not urlsplit(address).hostname:
        raise BadInput(f"--address {address}: name the cluster's dashboard, as in http://HOST:8265")
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=CONNECT_SECONDS) as answer:
            if "ray_version" in json.loads(answer.read()):
                return "disabled"
    except urllib.error.HTTPError as error:
        if error.code in {401, 403} and "authentication token" in error.read().decode(errors="replace"):
            return "token"
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise BadInput(
            f"--address {address}: nothing answers ({reason}): is the cluster up, and is this its dashboard?"
        ) from None
    except ValueError:
        pass  # not JSON
    raise BadInput(f"--address {address}: what answers is not Ray's dashboard: it is on port 8265 by default")
