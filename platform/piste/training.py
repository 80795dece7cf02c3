"""Ray Train: one run on N workers.

The driver runs `fit` in a thread and watches the ledger; one actor on the driver's node is the ledger's
writer; a worker that dies is replaced by Ray Train, and every rank goes on from the last checkpoint. Rank 0
hears from the writer when the run is to stop: the driver has got SIGTERM, or a host is being taken away.
Checkpoints are piste's own on shared storage, the same with and without Ray: Ray Train would make one
durable for a resume only at its controller's next poll.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

# Read by Ray when it is imported or started.
for _key, _value in {
    # Ray listens on the host's address: without a token any process could join. A Ray that was imported
    # before has made up its mind.
    **({} if "ray" in sys.modules else {"RAY_AUTH_MODE": "token"}),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    os.environ.setdefault(_key, _value)

import ray
import ray.train
import torch
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.train import (
    FailureConfig,
    PreemptionError,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from piste import catalog, tracking
from piste.config import Recipe, Resources, validate
from piste.errors import BadInput, PisteError, Terminated, cause
from piste.ledger import Ledger
from piste.preflight import check_hosts, check_resources, cpus
from piste.stopping import LOST, PREEMPTED
from piste.workload import Run
from piste.writer import ask, listener, start_writer, transport

NAMESPACE = "piste"
CONTROLLER_SECONDS = 2.0  # for Ray Train to notice that its controller has ended
SHUTDOWN_SECONDS = 20.0  # for the controller of a run that failed on its own account to end its workers


class RayRun(Run):
    """A workload's `Run` on one of several Ray Train workers."""

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model on this worker's device, in DistributedDataParallel where there are several workers."""
        wrapped: torch.nn.Module = ray.train.torch.prepare_model(model)
        return wrapped

    def mean(self, value: float) -> float:
        """The mean of a number over all workers."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return float(total) / self.world_size

    def _barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def _exchange(self, metrics: dict[str, float], step: int) -> None:
        ray.train.report({**metrics, "step": step})


@contextmanager
def cluster(resources: Resources, dashboard: bool = False) -> Iterator[None]:
    """A connection to Ray: the recipe's cluster, RAY_ADDRESS's, or a local Ray that ends with the context.

    Inside another such context it is that one's.

    Args:
        resources: The recipe's `[resources]`.
        dashboard: Start a local Ray with its dashboard, on loopback: without its state service Ray Train
            keeps the processors of a run whose controller was killed.

    Raises:
        BadInput: Nothing answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    temporary = None
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = resources.address or os.environ.get("RAY_ADDRESS")  # Ray sets it inside a job
    try:
        if address is not None:
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            temporary = tempfile.mkdtemp(prefix="piste-")  # short: a socket path has at most 107 bytes
            with _known_to_its_processes():
                ray.init(
                    address="local",
                    num_cpus=cpus(),
                    include_dashboard=dashboard,
                    namespace=NAMESPACE,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=200 * 2**20,
                    _temp_dir=temporary,
                )
    except SystemExit:  # Ray's own answer to SIGTERM
        raise Terminated from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        if address is None:
            raise BadInput(f"a local Ray cannot be started: {reason}: try --local") from None
        raise BadInput(f"the Ray cluster at {address}: {reason}: is it up?") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _known_to_its_processes() -> Iterator[None]:
    """A context in which the processes of a local Ray that starts are told its address.

    Ray Train's cleaner asks for it by the name `auto`, which is nobody's where two Rays are on a host: it
    would keep the processors of a pruned run for ever.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    told = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"{host}:{port}"}
    os.environ |= told
    try:
        yield
    finally:
        for key in told:
            del os.environ[key]


def preflight(config: Recipe, ledger_url: str) -> None:
    """Refuses, on the connected cluster, what cannot work there.

    Raises:
        BadInput: Too few CPUs or GPUs, or several hosts with storage that only one can see.
    """
    resources = config.resources
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    asked = {
        "CPU": resources.workers * resources.cpus_per_worker,
        "GPU": resources.workers * resources.gpus_per_worker,
    }
    for kind, amount in asked.items():
        if amount > total.get(kind, 0.0):
            raise BadInput(
                f"resources: the run needs {amount:g} {kind}s, the cluster has {total.get(kind, 0.0):g}"
            )
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    check_hosts(len(nodes), resources, ledger_url, tracking.tracking_uri(config.tracking.uri))


class Outcome(NamedTuple):
    """How an attempt of a run has ended.

    Attributes:
        failure: Why it failed, or None.
        stopped: Why it ended early and may go on (`ASKED`, `PREEMPTED`, `LOST`), or None.
    """

    failure: str | None = None
    stopped: str | None = None


def train(ledger: Ledger, run_id: str, config: Recipe, stop: threading.Event) -> bool:
    """Runs the next attempt of a run on Ray Train, and another one where it was preempted or lost.

    Args:
        ledger: The ledger that has it.
        run_id: The run.
        config: Its recipe.
        stop: Set when the run is to end early, with a checkpoint.

    Returns:
        Whether it has ended early because it was to.

    Raises:
        BadInput: The resources cannot be had.
        PisteError: The workload failed, or its workers died, were preempted or lost too often.
    """
    resources = config.resources
    check_resources(resources)
    with cluster(resources):
        preflight(config, ledger.url)
        writer = start_writer(ledger.url)

        def failed() -> str | None:
            row = ledger.run(run_id)
            return row.error if row.status == "failed" else None

        outcome, ended = Outcome(stopped=PREEMPTED), Counter[str]()
        limits = {PREEMPTED: resources.max_preemptions, LOST: resources.max_failures}
        while outcome.stopped in limits and not stop.is_set():
            outcome = fit(ask(writer.job.remote(run_id)), config, writer, failed, stop)
            ended[outcome.stopped or ""] += 1
            if outcome.stopped in limits and 0 <= limits[outcome.stopped] < ended[outcome.stopped]:
                outcome = Outcome(outcome.failure or _too_often(ended[PREEMPTED], resources))
        failure = None if outcome.stopped else outcome.failure or ask(writer.failure.remote(run_id))
        if failure is None:
            ray.kill(writer)  # else Ray Train may still ask it whether to go on
    if failure is not None:
        raise PisteError(failure)
    return outcome.stopped is not None


def _too_often(preemptions: int, resources: Resources) -> str:
    return (
        f"preempted {preemptions} times, and resources.max_preemptions = {resources.max_preemptions}: "
        "`piste resume` continues from the last checkpoint"
    )


def fit(
    job: Mapping[str, Any],
    config: Recipe,
    writer: Any,
    failed: Callable[[], str | None],
    stop: threading.Event | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> Outcome:
    """Runs the next attempt of a run on Ray Train's workers.

    Args:
        job: From the writer's `job`.
        config: The run's recipe.
        writer: The writer's handle.
        failed: Why the run has failed on its own account, asked twice a second: such a failure would come
            again on every replacement, so it ends the run at once.
        stop: Set when the run is to end early, with a checkpoint; none in a trial of Ray Tune.
        callbacks: Ray Train's, for a run that is a trial of Ray Tune.
    """
    resources, directory = config.resources, Path(job["directory"])
    gpus = resources.gpus_per_worker
    per_worker = {"CPU": resources.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    trainer = TorchTrainer(
        _work,  # type: ignore[arg-type]
        train_loop_config={**job, "writer": writer},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=gpus > 0, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            # A new name: Ray Train resumes silently from an earlier run of the same one.
            name=f"attempt-{job['attempt'] + 1}",
            storage_path=str(directory / "ray"),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=resources.max_failures,
                max_preemption_failures=0,  # counted by who calls this
            ),
            callbacks=[_EndsAtItsOwnFailure(writer, job["run_id"]), *callbacks],  # type: ignore[list-item]
        ),
    )
    outcome: list[Outcome] = []

    def run() -> None:
        try:
            outcome.append(Outcome(stopped=trainer.fit().return_value))  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            preempted = _was_preempted(error)
            outcome.append(Outcome(stopped=PREEMPTED) if preempted else Outcome(_reason(error)))
        except Exception as error:
            line = f"Ray: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            # The controller's answer was lost: its workers, if it has any, will hear that nobody waits.
            lost = isinstance(error, ActorUnavailableError)
            outcome.append(Outcome(line, LOST if lost else None))

    # In a thread, so that this one can be interrupted.
    thread = threading.Thread(target=run, name="piste-fit", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.5)
            if stop is not None and stop.is_set():
                writer.stop.remote()  # again and again: it may have been restarted
            if (failure := failed()) is not None:
                thread.join(SHUTDOWN_SECONDS)
                return Outcome(failure)
    finally:
        if stop is not None and thread.is_alive():
            # This driver is about to leave Ray, which ends the process at once where a thread waits for it.
            with contextlib.suppress(Exception):
                _end_controller()
            thread.join(CONTROLLER_SECONDS)
    return outcome[0]


class _EndsAtItsOwnFailure(UserCallback):
    """Makes Ray Train's controller end a run that failed on its own account, in place of another try.

    Ended from outside while it replaces its workers, it would leave their processors reserved until this
    driver ends.
    """

    def __init__(self, writer: Any, run_id: str) -> None:
        self._writer, self._run_id = writer, run_id

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by the controller with what its workers have raised; what this raises ends the run."""
        failure = None
        with contextlib.suppress(PisteError):  # no answer: the workers that take their places ask again
            failure = ask(self._writer.failure.remote(self._run_id))
        if failure is not None:
            raise PisteError(failure)


def _end_controller() -> None:
    """Ends the controller of this driver's run, of which Ray Train gives no handle."""
    job, driver = ray.get_runtime_context().get_job_id(), cast(Any, ray._private.worker.global_worker)
    for name, actor in ray._private.state.actors().items():
        if actor["ActorClassName"] == "TrainController" and actor["JobID"] == job:
            driver.core_worker.kill_actor(ray.ActorID(bytes.fromhex(name)), True)


def _was_preempted(error: TrainingFailedError) -> bool:
    """Whether a group of workers ended because a host was taken away before they had stopped."""
    if isinstance(error, WorkerGroupError):
        failures = error.worker_failures.values()
        return any(isinstance(each, RayActorError) and each.preempted for each in failures)
    return isinstance(error, PreemptionError)


def _reason(error: TrainingFailedError) -> str:
    """The first worker's failure on one line."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, failure = next(iter(error.worker_failures.items()))
        last = str(failure).strip().splitlines()[-1]
        return f"worker {rank} died too often: {last}: `piste resume` continues from the last checkpoint"
    return str(error).strip().splitlines()[-1]


def _work(job: Mapping[str, Any]) -> str | None:
    """What every Ray Train worker executes; returns why it ended early, where it was told to."""
    context = ray.train.get_context()
    rank, writer, run_id = context.get_world_rank(), job["writer"], job["run_id"]
    os.environ["PISTE_HOME"] = job["home"]  # a worker was started elsewhere, and maybe before it was set
    if ask(writer.failure.remote(run_id)) is not None:
        return None  # Ray Train would try again what has failed on its own account
    module = catalog.load_workload(job["config"]["workload"])
    config = validate(module.Config, job["config"], run_id)
    attempt = int(ask(writer.begin_attempt.remote(run_id))) if rank == 0 else 0
    nodes = _nodes(context.get_world_size())
    run = RayRun(
        run_id,
        config,
        Path(job["directory"]),
        transport(writer),
        attempt,
        rank=rank,
        world_size=context.get_world_size(),
        created=job["created"],
        told=listener(writer, run_id, attempt, nodes),
    )
    if config.resources.gpus_per_worker > 0:
        run.device = ray.train.torch.get_device()
    try:
        module.train(config, run)
        run.close()
        return run.stopped
    except Exception as error:
        text, path = traceback.format_exc(), Path(job["directory"]) / f"error-rank-{rank}.txt"
        with contextlib.suppress(OSError):  # a full disk, say: the failure itself is what is to be told
            path.write_text(text, encoding="utf-8")
        if not _lost_a_peer(error):
            ask(writer.fail.remote(run_id, cause(error)))
        raise


def _nodes(workers: int) -> list[str]:
    """The nodes of all workers: a collective of all ranks."""
    nodes = [ray.get_runtime_context().get_node_id()] * workers
    if workers > 1:
        torch.distributed.all_gather_object(nodes, nodes[0])
    return sorted(set(nodes))


def _lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another worker died: Ray Train then replaces the group."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in signs)
