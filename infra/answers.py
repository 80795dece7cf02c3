"""Asks a cluster what answers, from inside it: `python infra/answers.py DASHBOARD MLFLOW NODES SECONDS`.

Prints one line of JSON as soon as exactly `NODES` Ray nodes are alive and MLflow answers, or after `SECONDS`
what there is by then; exit code 1 where that is not it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.25
ANSWER_SECONDS = 3.0


def get(url: str, token: str | None = None) -> Any:
    """What an address answers, as JSON where it is; None where nothing does."""
    request = urllib.request.Request(url)
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            text = answer.read().decode()
    except OSError:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def living_nodes(dashboard: str, token: str) -> dict[str, str]:
    """The ids of the Ray nodes that are alive, with their addresses; none while the dashboard is silent."""
    answer = get(f"{dashboard}/api/v0/nodes?limit=1000", token)
    found = answer["data"]["result"]["result"] if isinstance(answer, dict) and answer.get("data") else []
    return {node["node_id"]: node["node_ip"] for node in found if node["state"] == "ALIVE"}


def main(dashboard: str, mlflow: str, nodes: str, seconds: str) -> int:
    """Asks until it is so or the time is over."""
    deadline = time.monotonic() + float(seconds)
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text(encoding="utf-8").strip()
    while True:
        living, mlflow_answers = living_nodes(dashboard, token), get(f"{mlflow}/health") is not None
        complete = len(living) == int(nodes) and mlflow_answers
        if complete or time.monotonic() > deadline:
            print(json.dumps({"nodes": living, "mlflow": mlflow_answers}))
            return 0 if complete else 1
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
