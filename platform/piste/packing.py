"""Many small trials as one tensor program.

A workload that can do that has, beside `train`,

    def train_many(configs: Sequence[Config], runs: PackedRuns) -> None
    def pack_key(config: Config) -> Hashable | None   # equal keys: one tensor program; None: runs alone

`groups` says which trials go together, `run_pack` runs some of them and measures, and a `PackSizer` learns
from the first packs of a sweep how large the next ones are to be.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from piste import catalog
from piste.config import Checkpoints, Optimizer, Recipe
from piste.errors import BadInput

Values = dict[str, tuple[tuple[int, ...], NDArray[np.float64]]]


class Measurement(NamedTuple):
    """What a pack has cost.

    Attributes:
        trials: How many it had.
        seconds: How long it took.
        bytes: By how much it raised the memory in use at most; None where the memory did not suffice.
        free: Bytes that were free before it began.
    """

    trials: int
    seconds: float
    bytes: int | None
    free: int


class PackedRuns:
    """Everything that `train_many` may touch: the runs of a pack, in the order of its configurations.

    Args:
        seeds: The seed of each trial.
        device: Where the pack computes.
        history: Keep every value of each metric, not the last one alone.

    Attributes:
        measured: What the pack has cost; several entries where it was halved.
    """

    def __init__(
        self, seeds: Sequence[int], device: torch.device | str = "cpu", history: bool = False
    ) -> None:
        self.seeds = tuple(seeds)
        self.device = torch.device(device)
        self.measured: list[Measurement] = []
        self._history = history
        self._logged: dict[str, list[tuple[int, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self.seeds)

    def log(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """Records metrics of a step of all trials.

        Args:
            metrics: Tensors `(trials,)` by their keys; NaN and infinities are recorded too.
            step: The step.

        Raises:
            ValueError: A tensor is of another shape.
        """
        for key, values in metrics.items():
            if values.shape != (len(self),):
                raise ValueError(f"{key} must be of shape ({len(self)},), got {tuple(values.shape)}")
            kept = self._logged.setdefault(key, [])
            if not self._history:
                kept.clear()
            kept.append((step, values.detach().to(torch.float64, copy=True)))

    def values(self) -> Values:
        """What was logged: by key the steps and the values `(steps, trials)`."""
        return {
            key: (tuple(step for step, _ in kept), torch.stack([values for _, values in kept]).cpu().numpy())
            for key, kept in self._logged.items()
        }

    def _join(self, parts: Sequence[PackedRuns]) -> None:
        """Takes over what the parts of this pack have logged; they are all at the same steps."""
        for key, kept in parts[0]._logged.items():
            columns = [[values for _, values in part._logged[key]] for part in parts]
            steps = (step for step, _ in kept)
            self._logged[key] = list(zip(steps, map(torch.cat, zip(*columns, strict=True)), strict=True))


def groups(module: ModuleType, configs: Sequence[Recipe]) -> tuple[list[list[int]], list[int]]:
    """Which trials can be one tensor program.

    A trial runs alone where its workload does not pack it, where it has several workers, and where it asks
    for checkpoints: packed trials keep none.

    Returns:
        The packs, and the trials that run alone, as indices of `configs` in their order.
    """
    key_of = getattr(module, "pack_key", None) if hasattr(module, "train_many") else None
    no_checkpoints = Checkpoints()
    packs: dict[Hashable, list[int]] = {}
    alone: list[int] = []
    for index, config in enumerate(configs):
        plain = config.resources.workers == 1 and config.checkpoints == no_checkpoints
        key = key_of(config) if key_of is not None and plain else None
        if key is None:
            alone.append(index)
        else:
            packs.setdefault(key, []).append(index)
    return list(packs.values()), alone


def run_pack(
    module: Any,
    configs: Sequence[Recipe],
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    history: bool = False,
) -> PackedRuns:
    """Runs trials as one tensor program, in halves where the memory does not suffice, and measures it.

    Args:
        module: The workload.
        configs: The trials, with equal pack keys.
        seeds: Their seeds, which stand above those of `configs`.
        device: Where to compute.
        history: As for `PackedRuns`.

    Raises:
        MemoryError: The memory does not suffice for a single trial (or `torch.OutOfMemoryError`).
    """
    torch.set_num_threads(configs[0].resources.cpus_per_worker)
    runs = PackedRuns(seeds, device, history)
    free = free_memory(runs.device)
    started = time.perf_counter()
    with _PeakMemory(runs.device) as memory:
        try:
            module.train_many(configs, runs)
            sufficed = True
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or len(configs) == 1:
                raise
            sufficed = False
    seconds = time.perf_counter() - started
    runs.measured.append(Measurement(len(configs), seconds, memory.peak if sufficed else None, free))
    if not sufficed:  # here and not above: the exception holds the tensors of the pack
        runs._logged.clear()
        half = len(configs) // 2
        cuts = (slice(half), slice(half, None))
        parts = [run_pack(module, configs[cut], seeds[cut], device, history) for cut in cuts]
        runs._join(parts)
        runs.measured += [each for part in parts for each in part.measured]
    return runs


class PackSizer:
    """Chooses how many trials a pack has, from what the packs of the same sweep have cost so far.

    The size grows by `growth` for as long as that lowers the time a trial takes by more than `least_gain`; a
    pack is never to need more than `memory_share` of the free memory, nor to have as many trials as one for
    which the memory did not suffice.

    Attributes:
        size: How many trials the next pack is to have.
    """

    def __init__(
        self,
        start: int = 32,
        growth: int = 4,
        least_gain: float = 0.1,
        memory_share: float = 0.25,
        largest: int = 2**16,
    ) -> None:
        self.size = start
        self._growth = growth
        self._least_gain = least_gain
        self._memory_share = memory_share
        self._limit = largest
        self._bytes_per_trial = 0.0
        self._settled = False
        self._best = (float("inf"), start)  # seconds a trial, and the size of that pack

    def learn(self, measured: Sequence[Measurement]) -> None:
        """Records what a call of `run_pack` has cost."""
        for trials, seconds, used, free in measured:
            if used is None:
                self.failed(trials)
            else:
                self.record(trials, seconds, used, free)

    def record(self, trials: int, seconds: float, bytes: int, free: int | None = None) -> None:
        """Records a pack that has ended.

        Args:
            trials: How many it had; fewer than `size` say nothing about the time.
            seconds: How long it took.
            bytes: By how much it raised the memory in use at most.
            free: Bytes that were free before it began; None: what this host has now.
        """
        self._bytes_per_trial = max(self._bytes_per_trial, bytes / trials)
        if trials >= self.size and not self._settled:
            seconds_per_trial, best = seconds / trials, self._best
            self._best = min(best, (seconds_per_trial, trials))
            self._settled = seconds_per_trial >= (1.0 - self._least_gain) * best[0]
            self.size = self._best[1] if self._settled else self._growth * trials
        available = free_memory(torch.device("cpu")) if free is None else free
        affordable = self._memory_share * available / max(self._bytes_per_trial, 1.0)
        self.size = max(1, min(self.size, self._limit, int(affordable)))

    def failed(self, trials: int) -> None:
        """Records that the memory did not suffice for so many trials."""
        self._limit = min(self._limit, max(1, trials // 2))
        self.size = min(self.size, self._limit)


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors on a device can have."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + cached)


@cache
def _optimizer_class(name: str) -> type[Any] | None:
    try:
        return catalog.load_optimizer(name)
    except BadInput:
        return None


def single_optimizer(section: Optimizer) -> type[Any] | None:
    """The class of an `[optimizer]` that is a name and keyword arguments alone.

    Returns:
        None where the section wraps another optimizer, has groups of its own or names no optimizer.
    """
    return None if section.base is not None or section.groups else _optimizer_class(section.name)


def _out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is short; torch's for the CPU has no type of its own."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "DefaultCPUAllocator" in str(error)


class _PeakMemory:
    """By how much a block raises the memory in use at most: exact on a GPU, sampled on a CPU.

    Attributes:
        peak: Bytes, when the block has ended.
    """

    period = 0.005

    def __init__(self, device: torch.device) -> None:
        self.peak = 0
        self._device = device
        self._cuda = device.type == "cuda"
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = self._process.memory_info().rss
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._ended.set()
            self._thread.join()
            self._look()

    def _sample(self) -> None:
        while not self._ended.wait(self.period):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss - self._before)
