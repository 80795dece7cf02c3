"""The relay: shows the ledger in MLflow, exactly once.

The ledger is the truth and MLflow the view. A relay follows a run's rows behind a high-water mark that
it keeps as a tag of the MLflow run, finds that run by the tag `piste.run_id` before it would create one,
and may repeat rows: MLflow ignores exact repeats, and a row keeps its timestamp.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlsplit

from filelock import FileLock

from piste.config import method_of
from piste.errors import BadInput, PisteError
from piste.home import home
from piste.ledger import WALL_CLOCK, Artifact, Ledger, StoredRow, number
from piste.ledger import Run as RunRow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

    from piste.sweep_tracking import SweepRelay

# With its three tags a batch stays within the 1,000 entities of one request of MLflow's, so that the mark is
# never set before the rows that it stands for.
BATCH = 997
MARK = "piste.relayed"
ALARM = "alarm/"  # how a metric begins that is an alarm of a detector
WHOLE = "piste.shown"  # the end of a run, once all of it is shown
TERMINAL = {"finished": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}


Kind = Literal["run", "sweep"]


class TrackingError(PisteError):
    """The tracking server or store cannot be reached or refuses."""


def tracking_uri(configured: str | None = None) -> str:
    """The store in use: the recipe's, else `MLFLOW_TRACKING_URI`, else SQLite under piste's home."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def without_credentials(uri: str) -> str:
    """The URI without user and password, which belong into `MLFLOW_TRACKING_USERNAME` and `_PASSWORD`."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


def check(uri: str) -> None:
    """Makes sure that a tracking URI is usable before a run starts.

    Raises:
        BadInput: Its scheme is unknown, it has a password, or nothing answers there.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme not in {"http", "https", "sqlite", "postgresql", "mysql", "mssql"}:
        raise BadInput(f"tracking.uri {uri!r}: use an http(s) server or a database such as sqlite:///FILE")
    if scheme not in {"http", "https"} and urlsplit(uri).password is not None:
        raise BadInput(
            "tracking.uri has a password, which would be shown with the run: put it where the database's "
            "client finds it, such as PGPASSFILE"
        )
    if scheme in {"http", "https"}:
        if without_credentials(uri) != uri:
            raise BadInput(
                "tracking.uri names a user or a password, which would be shown with the run: put them into "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=3).close()
        except urllib.error.HTTPError:
            pass  # it answers; whether we may log in is seen at the first call
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise BadInput(f"tracking.uri {uri}: nothing answers ({reason}): start it or unset it") from None


class Relay:
    """Relays one run.

    Args:
        ledger: The ledger that has it.
        run_id: The run.
        uri: The MLflow store.
    """

    def __init__(self, ledger: Ledger, run_id: str, uri: str) -> None:
        self._ledger = ledger
        self._run_id = run_id
        self._uri = uri
        self._client = client(uri)
        self._uploaded: dict[str, str] = {}
        self.mark = 0  # the last of the ledger's rows that are shown
        self._attempt = -1
        self._shown_end: str | None = None
        self.mlflow_run_id: str | None = None
        self.experiment_id = ""
        self._is_found = False

    def step(self) -> bool:
        """Pushes all that is new; returns whether the run has ended and is shown whole.

        Raises:
            Exception: Whatever MLflow's client raises; the same call may be repeated.
        """
        try:
            return self._step()
        except Exception:
            self._is_found = False  # any more: another relay may have removed it as a double
            raise

    def _step(self) -> bool:
        run = self._ledger.run(self._run_id)  # before its rows: what a terminal run lacks is really absent
        if not self._is_found:
            self._find_or_create(run)
        assert self.mlflow_run_id is not None
        if self._is_whole(run):
            return True
        if run.attempt != self._attempt and run.status == "running":
            self._client.update_run(self.mlflow_run_id, status="RUNNING")
            self._attempt = run.attempt
        while rows := self._ledger.metrics_after(run.id, self.mark, BATCH):
            self._push(rows)
        for artifact in self._lacking_files():
            folder = Path(artifact.name).parent.as_posix()
            self._client.log_artifact(self.mlflow_run_id, artifact.uri, None if folder == "." else folder)
            self._uploaded[artifact.name] = artifact.sha256
        if run.status not in TERMINAL:
            return False
        self._finish(run)
        return True

    def pending(self) -> int:
        """How many metrics and files the view still lacks."""
        if self._is_whole(self._ledger.run(self._run_id)):
            return 0
        return self._ledger.count_after(self._run_id, self.mark) + len(self._lacking_files())

    def _is_whole(self, run: RunRow) -> bool:
        """Whether this end of the run is shown already, and no row has come since."""
        return self._shown_end == _end(run) and not self._ledger.count_after(run.id, self.mark)

    def _lacking_files(self) -> list[Artifact]:
        """The pictures and tables that this relay has not shown; checkpoints stay where they are."""
        files = [a for a in self._ledger.artifacts(self._run_id) if a.kind != "checkpoint"]
        return [a for a in files if self._uploaded.get(a.name) != a.sha256]

    def _push(self, rows: list[StoredRow]) -> None:
        assert self.mlflow_run_id is not None
        metrics, tags = shown_metrics(rows)
        self._client.log_batch(self.mlflow_run_id, metrics=metrics, tags=tags)
        self.mark = rows[-1].id

    def _find_or_create(self, run: RunRow) -> None:
        """Takes up the MLflow run that an earlier relay has made, or makes it."""
        name = run.config["tracking"]["experiment"]
        experiment = find_or_create_experiment(self._client, self._uri, name)
        found = self._only(experiment)
        if found is None:
            start = int(run.created * 1000)
            self._client.create_run(
                experiment, start, tags(run, self._ledger.provenance(run)), run_name=run.id
            )
            found = self._only(experiment)
            assert found is not None
        self._take_up(found, run)
        if MARK not in found.data.tags:  # it is new, or a relay was cut off before it had described it
            provenance = self._ledger.provenance(run)
            describe(self._client, found.info.run_id, run.config, run.directory, provenance)
            self._client.set_tag(found.info.run_id, MARK, "0")
        self._is_found = True

    def _only(self, experiment: str) -> MlflowRun | None:
        """The MLflow run that shows this one; of several, the one that shows most stays.

        A request that was given up may be carried out later and its repetition too, and two relays may have
        found none at the same time.
        """
        all_of_it = self._client.search_runs([experiment], f"tags.`piste.run_id` = '{self._run_id}'")
        found = sorted(all_of_it, key=lambda each: (-int(each.data.tags.get(MARK, -1)), each.info.run_id))
        for double in found[1:]:
            self._client.delete_run(double.info.run_id)
        return found[0] if found else None

    def _take_up(self, found: MlflowRun, run: RunRow) -> None:
        """Goes on where an earlier relay has ended; what it has shown whole is not shown again."""
        if self.mlflow_run_id != found.info.run_id:  # what was shown in another does not count
            self._uploaded.clear()
            self._attempt = -1
        self.mlflow_run_id, self.experiment_id = found.info.run_id, found.info.experiment_id
        # A relay that has fallen behind may have set the status back.
        is_shown = found.info.status == TERMINAL.get(run.status)
        self._shown_end = found.data.tags.get(WHOLE) if is_shown else None
        self.mark = int(found.data.tags.get(MARK, 0))

    def _finish(self, run: RunRow) -> None:
        from piste.reporting import loss_curves

        assert self.mlflow_run_id is not None
        if "train/loss" in self._ledger.keys(run.id):
            picture = loss_curves(self._ledger, [run.id], Path(run.directory) / "loss.png")
            self._client.log_artifact(self.mlflow_run_id, str(picture))
        closing = {
            "piste.status": run.status,
            "piste.attempts": str(run.attempt),
            "piste.recomputed_different": str(run.recomputed_different),
            "piste.error": run.error or "",
        }
        tables = [a.name for a in self._ledger.artifacts(run.id) if a.kind == "table"]
        if tables:
            listed = [{"path": name, "type": "table"} for name in tables]
            closing["mlflow.loggedArtifacts"] = json.dumps(listed)
        for key, value in closing.items():
            self._client.set_tag(self.mlflow_run_id, key, value)
        ended = int((run.finished or time.time()) * 1000)
        self._client.set_terminated(self.mlflow_run_id, TERMINAL[run.status], ended)
        self._client.set_tag(self.mlflow_run_id, WHOLE, _end(run))
        self._shown_end = _end(run)


def _end(run: RunRow) -> str:
    """Which end of a run it is: a resumed one has another."""
    return f"{run.status} at attempt {run.attempt}"


def find_or_create_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, made where it is missing."""
    found = client.get_experiment_by_name(name)
    if found is None:
        local = urlsplit(uri).scheme == "sqlite"
        location = str(home() / "mlflow-artifacts" / quote(name)) if local else None
        try:
            # MLflow's list of experiments then opens it among those that train models.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client.create_experiment(name, artifact_location=location, tags=kind)
        except Exception:
            found = client.get_experiment_by_name(name)  # another relay was first
            if found is None:
                raise
    return str(found.experiment_id)


def describe(
    client: MlflowClient,
    mlflow_run_id: str,
    config: Mapping[str, Any],
    directory: str,
    provenance: Mapping[str, Any],
) -> None:
    """Gives an MLflow run its parameters, its recipe and where it comes from."""
    from mlflow.entities import Param

    from piste.provenance import environment

    flat = flatten({k: v for k, v in config.items() if k != "tracking"})
    parameters = [Param(key, str(value)[:6000]) for key, value in flat.items()]
    for start in range(0, len(parameters), 100):
        client.log_batch(mlflow_run_id, params=parameters[start : start + 100])
    recipe = Path(directory) / "recipe.toml"
    if recipe.exists():
        client.log_artifact(mlflow_run_id, str(recipe))
    client.log_text(mlflow_run_id, environment(), "environment.txt")
    client.log_text(mlflow_run_id, json.dumps(provenance, indent=1), "provenance.json")


def shown_metrics(rows: Sequence[StoredRow], objective: str = "") -> tuple[list[Any], list[Any]]:
    """Rows of the ledger as MLflow's metrics, and the tags that say how far they go."""
    from mlflow.entities import Metric as View
    from mlflow.entities import RunTag

    # MLflow's comparison page opens on the metric that came first: the objective, none of the machine's.
    finite = sorted(
        (r for r in rows if r.special is None),
        key=lambda r: (r.key != objective, r.key.startswith(WALL_CLOCK)),
    )
    marked = [r for r in rows if r.special is not None]
    metrics = [View(metric_name(r.key), number(r), r.timestamp, r.step) for r in finite]
    # NaN would take the run out of MLflow's comparison plots, so a non-finite value is shown as a mark.
    metrics += [View(f"nonfinite/{metric_name(r.key)}", 1.0, r.timestamp, r.step) for r in marked]
    tags = [RunTag(MARK, str(rows[-1].id))]
    if marked:
        last = marked[-1]
        tags.append(RunTag("piste.nonfinite", f"{last.key} = {last.special} at {last.step}"))
    if alarms := [r for r in rows if r.key.startswith(ALARM)]:
        last = alarms[-1]
        tags.append(RunTag("piste.alarm", f"{last.key.removeprefix(ALARM)} at {last.step}"))
    return metrics, tags


def tags(run: RunRow, origin: Mapping[str, Any]) -> dict[str, str]:
    """What identifies and describes a run in MLflow."""
    git = origin.get("git", {})
    hardware = origin.get("hardware", {})
    named = {
        "piste.run_id": run.id,
        "piste.kind": "run",
        "piste.recipe": run.recipe,
        "piste.workload": run.workload,
        "piste.identity": run.identity,
        "piste.cell": run.cell,
        "piste.code_version": origin.get("code_version", ""),
        "piste.data_hash": origin.get("data_hash", ""),
        "piste.command": origin.get("command", ""),
        "piste.hardware": f"{hardware.get('processor')}, {hardware.get('cores')} cores, "
        f"{hardware.get('memory_gib')} GiB, GPUs: {', '.join(hardware.get('gpus', [])) or 'none'}",
        "piste.host": str(hardware.get("host", "")),
        "mlflow.source.git.commit": git.get("commit", ""),
        "piste.git.dirty": str(git.get("dirty", "")),
        "mlflow.note.content": _note(run),
    }
    named |= {f"version.{name}": version for name, version in origin.get("libraries", {}).items()}
    return {key: value[:5000] for key, value in named.items() if value}


def _note(run: RunRow) -> str:
    if run.is_stream:
        return (
            f"Streams of **{run.workload}**, seed {run.seed}, from recipe `{run.recipe}`. The step of a "
            "metric is the event's number; the first alarms of each stream are in `alarms.json`."
        )
    method = method_of(run.config)
    settings = ", ".join(f"{k}={v}" for k, v in method.items() if k not in {"name", "base", "groups"} and v)
    return (
        f"**{run.workload}** trained with **{method['name']}** ({settings or 'default settings'}), "
        f"seed {run.seed}, {run.config['resources']['workers']} worker(s), from recipe `{run.recipe}`.\n\n"
        f"Repeat it: `piste rerun {run.id}`. Its resolved recipe is the artifact `recipe.toml`."
    )


def metric_name(key: str) -> str:
    """A metric's name in MLflow, which takes letters, digits and `_-. :/` alone."""
    name = posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", key).replace("..", "_").strip("/"))
    return "_" if name == "." else name


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names; `None` is left out."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def client(uri: str) -> MlflowClient:
    """An MLflow client of a store that exists: a local database is created or upgraded once, by one process.

    Raises:
        TrackingError: The store cannot be made or opened.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    if urlsplit(uri).scheme == "sqlite":
        path = Path(uri.partition("sqlite:///")[2])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                return MlflowClient(tracking_uri=uri)  # makes or upgrades the tables
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise TrackingError(
                f"MLflow store {uri}: {reason}: move it away or set MLFLOW_TRACKING_URI"
            ) from error
    return MlflowClient(tracking_uri=uri)


def find_run(uri: str, run_id: str) -> tuple[str, str] | None:
    """The MLflow `(experiment id, run id)` of a run, or None where it is not shown."""
    made = client(uri)
    experiments = [e.experiment_id for e in made.search_experiments()]
    found = made.search_runs(experiments, f"tags.`piste.run_id` = '{run_id}'", max_results=1)
    return (found[0].info.experiment_id, found[0].info.run_id) if found else None


def sweep_address(uri: str, sweep_id: str) -> str:
    """The MLflow page that compares the trials of a sweep, or that of the server where it is not shown."""
    base = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    for experiment in client(uri).search_experiments():
        if view_key(sweep_id) in experiment.tags:
            return f"{base}/#{view_page(experiment.experiment_id, sweep_id)}"
    return base


def view_key(sweep_id: str) -> str:
    """The tag of an experiment where MLflow finds how a sweep's trials are laid out."""
    return f"mlflow.sharedViewState.{metric_name(sweep_id)}"


def view_page(experiment_id: str, sweep_id: str) -> str:
    """MLflow's chart view of a sweep's trials, laid out as the experiment's tag says."""
    view = f"viewStateShareKey={quote(metric_name(sweep_id), safe='')}"
    return f"/experiments/{experiment_id}/runs?{view}&compareRunsMode=CHART&workflowType=machine_learning"


def relay_of(ledger: Ledger, kind: Kind, name: str, uri: str) -> Relay | SweepRelay:
    """The relay of a run or a sweep."""
    if kind == "run":
        return Relay(ledger, name, uri)
    from piste.sweep_tracking import SweepRelay

    return SweepRelay(ledger, name, uri)


def sync(ledger: Ledger, names: Iterable[tuple[Kind, str]]) -> dict[str, int]:
    """Pushes what is pending of runs and sweeps, in this process; returns what remains for each."""
    remaining = {}
    for kind, name in names:
        config = (ledger.sweeps.get(name) if kind == "sweep" else ledger.run(name)).config
        relay = relay_of(ledger, kind, name, tracking_uri(config["tracking"]["uri"]))
        relay.step()
        remaining[name] = relay.pending()
    return remaining


def serving(uri: str) -> str | None:
    """Where MLflow's server already runs on a store: the address, or None."""
    try:
        known = json.loads(_served().read_text())
    except (OSError, ValueError):
        return None
    return str(known["address"]) if known["uri"] == uri and _answers(known["address"]) else None


def serve(uri: str, port: int, ready: Callable[[str], None]) -> None:
    """Runs MLflow's server on loopback until it is interrupted.

    Args:
        uri: The store.
        port: The port.
        ready: Called with the address once the server answers.

    Raises:
        BadInput: Something else has the port.
        TrackingError: The server ended before it answered.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise BadInput(f"port {port}: {error.strerror}: name another with --port") from None
    address = f"http://127.0.0.1:{port}"
    environment = os.environ | _ENVIRONMENT | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with contextlib.suppress(KeyboardInterrupt), subprocess.Popen(command, env=environment) as server:
        while not _answers(address):
            if server.poll() is not None:
                raise TrackingError(f"MLflow's server on {uri} ended with exit code {server.returncode}")
            time.sleep(0.2)
        _served().write_text(json.dumps({"uri": uri, "address": address}))
        ready(address)
        server.wait()


def _served() -> Path:
    return home() / "mlflow-server.json"


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health", timeout=2).close()
    except OSError:
        return False
    return True
