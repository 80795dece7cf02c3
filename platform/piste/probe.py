"""What a cluster is asked before anything is sent to it; runs there, so nothing of piste is imported.

Its source travels in the environment of a small job, which prints the answer as one line of JSON.
"""

import importlib.metadata
import json
import os
import platform
import sys
import urllib.request
from pathlib import Path
from typing import Any

MARK = "piste-probe: "


def survey(question: dict[str, Any]) -> dict[str, Any]:
    """One host's answer: its versions, and what it cannot reach.

    Args:
        question: `libraries`, `ledger`, `job`, `tracking`, `home` and `token`, the name of a file that
            the first host has made under `home`.
    """
    versions: dict[str, str | None] = {}
    for name in question["libraries"]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    checks = {"PISTE_LEDGER": _ledger, "MLFLOW_TRACKING_URI": _tracking, "PISTE_HOME": _storage}
    problems = []
    for setting, check in checks.items():
        try:
            check(question)
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            problems.append(f"{setting}: {line or type(error).__name__}")
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": versions,
        "problems": problems,
    }


def _ledger(question: dict[str, Any]) -> None:
    from sqlalchemy import create_engine, text

    file = question["ledger"].partition(":///")[2]
    if question["ledger"].startswith("sqlite") and not Path(file).exists():
        raise FileNotFoundError(f"{file} does not exist there")
    engine = create_engine(question["ledger"])
    try:
        with engine.connect() as connection:
            query = text("select count(*) from jobs where id = :job")
            if connection.execute(query, {"job": question["job"]}).scalar_one() != 1:
                raise LookupError("another ledger than this one")
    finally:
        engine.dispose()


def _tracking(question: dict[str, Any]) -> None:
    if question["tracking"].startswith("http"):
        urllib.request.urlopen(question["tracking"].rstrip("/") + "/health", timeout=5).close()


def _storage(question: dict[str, Any]) -> None:
    home = Path(question["home"])
    home.mkdir(parents=True, exist_ok=True)
    token = home / question["token"]
    if question["first"]:
        token.touch()
    elif not token.exists():
        raise FileNotFoundError(f"{home} is not shared: a file made on one host is not seen on another")


def ask_all(question: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of all hosts; the first is that of the host which asks."""
    answers = [survey({**question, "first": True})]
    try:
        if question["nodes"] > 1:
            answers += _others(question)
    finally:
        (Path(question["home"]) / question["token"]).unlink(missing_ok=True)
    return answers


def _others(question: dict[str, Any]) -> list[dict[str, Any]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    here = ray.get_runtime_context().get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    others = [n["NodeID"] for n in nodes if n["Alive"] and n["NodeID"] != here]
    asked = ray.remote(num_cpus=0)(survey)
    references = [
        asked.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            {**question, "first": False}
        )
        for node in others
    ]
    answers: list[dict[str, Any]] = ray.get(references, timeout=60)
    return answers


if __name__ == "__main__":
    print(MARK + json.dumps(ask_all(json.loads(os.environ["PISTE_PROBE_QUESTION"]))), flush=True)
    sys.exit(0)
