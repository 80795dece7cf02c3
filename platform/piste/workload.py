"""The contract between a workload and the platform.

A workload is a module with

    class Config(Recipe, frozen=True): ...       # typed fields with defaults that run on two cores
    def train(config: Config, run: Run) -> None  # runs on every worker; one process or many, the same code

and, where it has them,

    def prepare_data(config) -> str              # once, before any worker: makes the data, returns its hash
    verbs = {"sample": sample}                   # what a finished run can be asked: `piste call RUN VERB`
    headline = ("valid/loss", "time/step_ms")    # the metrics that a comparison shows
    curve = Curve("valid/loss", "loss (nats)")   # the metric whose learning curves a comparison draws
    Config.total_steps                           # a property: where the run ends, for progress and ETA

A workload talks to its `Run` alone. It steps with `optimizer.step(closure)`, so that optimizers of one
pass and of two run in the same loop, logs at any rate, and reports at most about once a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch

from piste.buffer import MetricBuffer, Send
from piste.checkpoints import CheckpointStore, load_model
from piste.errors import PisteError
from piste.ledger import Ledger
from piste.stopping import ASKED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from piste.config import Recipe

T = TypeVar("T", bound=Sequence[Any])


class Curve(NamedTuple):
    """Which learning curves a comparison of a workload's runs draws.

    Attributes:
        metric: What is compared, logged at the same steps as `seconds`.
        label: What it is in words, and its unit.
        step: What a step is, in the plural.
        seconds: The metric that has the seconds of training so far.
        mode: Whether a low or a high value is good.
    """

    metric: str
    label: str
    step: str = "steps"
    seconds: str = "time/train_s"
    mode: Literal["min", "max"] = "min"


class Run:
    """Everything that a workload may touch; this class is the in-process one.

    Attributes:
        id: The run's id.
        seed: The recipe's seed; the global torch generator starts from it.
        rank: This worker's number.
        world_size: How many workers there are.
        device: Where this worker computes.
        directory: The run's folder, shared by all workers.
        stopped: Why the workload ends early, once it has been told to; None before.

    Args:
        run_id: The run's id.
        config: Its recipe.
        directory: Its folder.
        send: Delivers metrics to the ledger's writer.
        attempt: The number of this attempt.
        rank: This worker's number.
        world_size: How many workers there are.
        created: When the run was created, in seconds since the epoch.
        stop: Set when the run is to end early.
        told: Asked about once a second, on rank 0: why the run is to end early, or None.
    """

    def __init__(
        self,
        run_id: str,
        config: Recipe,
        directory: Path,
        send: Send,
        attempt: int,
        rank: int = 0,
        world_size: int = 1,
        created: float | None = None,
        stop: threading.Event | None = None,
        told: Callable[[], str | None] | None = None,
    ) -> None:
        self.id = run_id
        self.seed = config.seed
        self.rank = rank
        self.world_size = world_size
        self.directory = directory
        self.device = torch.device("cuda" if config.resources.gpus_per_worker > 0 else "cpu")
        self._checkpoints = CheckpointStore(directory / "checkpoints", config.checkpoints.keep)
        self._stop = stop or threading.Event()
        self._why = ASKED
        self._told = told
        self.stopped: str | None = None
        self._buffer: MetricBuffer | None = None
        if rank == 0:
            sample = _SystemSampler(created or time.time()) if config.tracking.system_metrics else None
            self._buffer = MetricBuffer(send, run_id, attempt, sample, self._listen if told else None)
        torch.set_num_threads(config.resources.cpus_per_worker)
        torch.manual_seed(self.seed)

    # -- what a workload says -----------------------------------------------------------------------

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records metrics of a step; any rate, rank 0, never blocks.

        Names are grouped by slashes (`train/loss`); NaN and infinities are recorded and marked.
        """
        if self._buffer is not None:
            self._buffer.append(metrics, step)

    def report(
        self, metrics: Mapping[str, float], step: int, checkpoint: Mapping[str, Any] | None = None
    ) -> None:
        """Logs metrics and, with a state, keeps a checkpoint: a collective of all ranks.

        All earlier metrics are acknowledged before the scheduler hears of them and before the checkpoint
        becomes visible, so what a checkpoint has seen is durable. The states of the random generators are
        added to it.

        Args:
            metrics: As for `log`.
            step: The step after which the state was taken.
            checkpoint: The state: tensors, numbers, strings, lists and dicts (what `torch.load` reads
                safely). Every rank passes one; rank 0's is the one that `restore` returns.

        Raises:
            LedgerError: The ledger refuses earlier metrics.
            CheckpointError: The checkpoint cannot be written.
        """
        self.log(metrics, step)
        if self._buffer is not None:
            self._buffer.flush()
        if checkpoint is not None:
            random = {"random": _random_state(self.device)}
            state = {**checkpoint, "step": step} if self.rank == 0 else {}
            self._checkpoints.write(step, self.rank, {**state, **random})
            self._barrier()
            if self._buffer is not None:
                self._buffer.artifact(self._checkpoints.commit(step))
                self._buffer.flush()
        self._exchange(dict(metrics), step)

    def restore(self) -> dict[str, Any] | None:
        """The state of the newest undamaged checkpoint, or None at the start of a run.

        The random generators are set to where they were. Every rank gets the state that rank 0 passed to
        `report`, with its `"step"`.
        """
        self._barrier()
        found = self._checkpoints.latest(self.rank, self.note)
        if found is None:
            return None
        state, own = found
        if "random" in own:
            _set_random_state(own["random"], self.device)
        return {key: value for key, value in state.items() if key != "random"}

    def resume(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restores `"model"` and `"optimizer"` of the newest checkpoint; returns its step, or 0.

        Args:
            model: As it was before `prepare`.
            optimizer: Its optimizer.

        Raises:
            CheckpointError: The checkpoint is of another architecture; the first mismatch is named.
        """
        state = self.restore()
        if state is None:
            return 0
        load_model(model, state["model"], f"checkpoint of step {state['step']}")
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def figure(self, name: str, figure: Figure, step: int | None = None) -> None:
        """Keeps a matplotlib figure as a picture of the run."""
        if self._buffer is not None:
            path = self._artifact_path(f"{name}.png")
            figure.savefig(path, dpi=120)
            self._record("figure", path, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int | None = None) -> None:
        """Keeps a table: a row a mapping, all with the same keys."""
        if self._buffer is not None:
            columns = list(rows[0]) if rows else []
            path = self._artifact_path(f"{name}.json")
            path.write_text(
                json.dumps({"columns": columns, "data": [[row[c] for c in columns] for row in rows]})
            )
            self._record("table", path, step)

    # -- what a workload asks -----------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model on this worker's device, wrapped so that gradients are averaged over workers."""
        return model.to(self.device)

    def shard(self, data: T) -> T:
        """This worker's part of a batch of indices or items: every `world_size`-th, from `rank`."""
        return data[self.rank :: self.world_size]  # type: ignore[return-value]

    def mean(self, value: float) -> float:
        """The mean of a number over all workers: a collective of all ranks."""
        return value

    @property
    def should_stop(self) -> bool:
        """Whether the run was asked to end: finish the step, report a checkpoint, return."""
        if self._stop.is_set():
            self.stopped = self._why
        return self._stop.is_set()

    # -- what the platform says ---------------------------------------------------------------------

    def stop(self, why: str = ASKED) -> None:
        """Asks the workload to end after its current step."""
        self._why = why
        self._stop.set()

    def close(self) -> None:
        """Waits until everything logged is in the ledger."""
        if self._buffer is not None:
            self._buffer.close()

    def _listen(self) -> None:
        """Hears whether the run is to end early; a writer that does not answer is asked again."""
        assert self._told is not None
        with contextlib.suppress(PisteError):
            if not self._stop.is_set() and (why := self._told()) is not None:
                self.stop(why)

    def note(self, line: str) -> None:
        """Adds a line to the run's log, on rank 0; it is told when the run has ended."""
        if self._buffer is not None:
            path = self._artifact_path("log.txt")
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            self._record("log", path, None)

    def _barrier(self) -> None:
        """Waits for all ranks."""

    def _exchange(self, metrics: dict[str, float], step: int) -> None:
        """Tells the scheduler of the run, if it has one."""

    def _artifact_path(self, name: str) -> Path:
        path = self.directory / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _record(self, kind: str, path: Path, step: int | None) -> None:
        content = path.read_bytes()
        assert self._buffer is not None
        self._buffer.artifact(
            {
                "kind": kind,
                "name": str(path.relative_to(self.directory / "artifacts")),
                "uri": str(path),
                "sha256": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "step": step,
            }
        )


def local_run(
    run_id: str, config: Recipe, directory: Path, ledger: Ledger, stop: threading.Event | None = None
) -> Run:
    """A run in this process: one worker, its ledger writer a plain call from the buffer's thread."""
    created = ledger.run(run_id).created
    attempt = ledger.begin_attempt(run_id)
    return Run(run_id, config, directory, ledger.apply, attempt, created=created, stop=stop)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class _SystemSampler:
    """CPU and memory of this process and its host, every two seconds.

    The step counts seconds since the run was created, over all its attempts: a step that an earlier attempt
    has used would be ignored by the ledger.
    """

    period = 2.0

    def __init__(self, created: float) -> None:
        import psutil

        self._psutil = psutil
        self._process = psutil.Process()
        self._created = created
        self._last = time.monotonic()
        self._process.cpu_percent()
        psutil.cpu_percent()

    def __call__(self) -> tuple[dict[str, float], int]:
        now = time.monotonic()
        if now - self._last < self.period:
            return {}, 0
        self._last = now
        memory = self._psutil.virtual_memory()
        metrics = {
            "system/process_cpu_percent": self._process.cpu_percent(),
            "system/process_memory_mib": self._process.memory_info().rss / 2**20,
            "system/host_cpu_percent": self._psutil.cpu_percent(),
            "system/host_memory_percent": memory.percent,
        }
        if torch.cuda.is_available():
            metrics["system/gpu_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        return metrics, round(time.time() - self._created)
