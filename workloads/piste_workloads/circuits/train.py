"""Training: epochs of updates, a validation after each; flows are summed over workers before an update."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from piste.checkpoints import CheckpointError
from piste.errors import PisteError
from piste.workload import Run
from piste_algorithms.circuits import Circuit, LearningRule, StepInfo
from piste_algorithms.circuits.structure import from_json, to_json
from piste_workloads.circuits.building import build_circuit, build_rule
from piste_workloads.circuits.config import Config
from piste_workloads.circuits.data import open_rows
from piste_workloads.circuits.evaluation import Held, evaluate
from piste_workloads.circuits.pictures import draw
from piste_workloads.circuits.progress import Progress, likelihoods, of_updates
from piste_workloads.circuits.rows import Encoding
from piste_workloads.grokking.points import seeded
from piste_workloads.hardware import now

FORMAT = 1  # of a checkpoint's content


def prepare_data(config: Config) -> str:
    """Makes the rows, once and before any worker.

    Returns:
        Their hash.

    Raises:
        BadInput: They cannot be had, or no circuit of the recipe's kind can be made for them.
    """
    rows = open_rows(config.data)
    if config.model.name == "file":
        build_circuit(config, rows, config.seed)
    return rows.sha256


def train(config: Config, run: Run) -> None:
    """Learns a circuit's parameters; a step of the metrics is an epoch.

    Logs, each epoch, of `train` (means over the epoch's batches, before each update) and, every
    `evaluate_every` epochs and after the last, of `valid`: `log_likelihood` (nats a row),
    `bits_per_dimension` (of the observed values) and `loss` (nats a row, the log-likelihood's negative), for
    tokens `bits_per_byte`, for labelled rows `accuracy`; at the end that of `test`. Also `rule/step_size`,
    `rule/rate_min`, `rule/rate_mean`, `rule/rate_max` (implicit learning rates of nodes), `cost/updates`,
    `cost/rows`, `time/step_ms` and `time/epoch_cpu_s` (of the epoch's updates, by the clock and over this
    worker's threads), `time/train_s` and `time/cpu_s` (likewise, of all updates so far), `time/rows_per_s`,
    and `best/log_likelihood` with `best/epoch` of the validations. `train/impossible` counts rows of
    probability zero, which teach nothing.

    Raises:
        BadInput: As `prepare_data`.
        PisteError: All rows of an update have probability zero.
        CheckpointError: The checkpoint is of another version of this workload.
    """
    rows = open_rows(config.data)
    state = run.restore()
    circuit = (build_circuit(config, rows, run.seed) if state is None else restored(state)).to(run.device)
    updates = config.train.epochs * config.updates(len(rows.parts["train"]))
    learner = Learner(config, run, build_rule(config, circuit, updates), rows.parts["train"])
    progress, last = learner.progress, 0
    best: dict[str, Tensor] = {}  # the parameters of the best validation, where they are kept
    if state is None:
        run.table("data", rows.table())
        for line in rows.told:
            run.note(line)
    else:
        learner.rule.load_state_dict(state["rule"])
        progress = learner.progress = Progress(**state["progress"])
        last = int(state["step"])
        best = {name: table.to(run.device) for name, table in state["best"].items()}
    valid, test = (Held(part, rows, run.device) for part in ("valid", "test"))

    while not _ended(config, progress, last):
        last += 1
        run.log(learner.epoch(last), last)
        reported: dict[str, float] = {}
        validated = last == config.train.epochs or last % config.train.evaluate_every == 0
        if validated:
            reported |= evaluate(circuit, run, valid)
            progress.validated(last, reported["valid/log_likelihood"])
            if config.train.keep_best and progress.since == 0:
                best = circuit.parameters()
            reported |= {"best/log_likelihood": progress.best, "best/epoch": float(progress.best_epoch)}
        final = _ended(config, progress, last)
        if final:
            reported |= evaluate(_with(circuit, best), run, test)
        stop = run.mean(float(run.should_stop)) > 0.0  # asked on one worker, agreed on by all
        if stop or final or config.checkpoints.due(last, config.train.epochs):
            run.report(reported, last, checkpoint=state_of(circuit, rows.encoding, best) | learner.state())
        elif reported:
            run.report(reported, last)
        if stop and not final:
            return
    if run.rank == 0:
        draw(run, config, _with(circuit, best), rows, progress, last)


class Learner:
    """Takes an epoch's updates.

    Attributes:
        progress: What has been spent so far.
    """

    def __init__(self, config: Config, run: Run, rule: LearningRule, train: Tensor) -> None:
        self.rule = rule
        self.progress = Progress()
        self._config, self._run = config, run
        self._train = train.to(run.device)

    def epoch(self, number: int) -> dict[str, float]:
        """One epoch, counted from 1; its metrics."""
        began, cpu = now(self._run.device), time.process_time()
        size = self._config.epoch_size(len(self._train))
        order = torch.randperm(len(self._train), generator=seeded(self._run.seed, f"epoch {number}"))[:size]
        batches = torch.split(order, self._config.train.batch)
        together = len(batches) if self._config.rule.settings.whole_epoch else self.rule.updates_every
        infos: list[StepInfo] = []
        for place, batch in enumerate(batches, start=1):
            mine = self._run.shard(batch)  # type: ignore[type-var]
            if len(mine) > 0:
                self.rule.accumulate(self._train[mine.to(self._run.device)])
            if place % together == 0 or place == len(batches):
                infos.append(self._update())
        seconds = now(self._run.device) - began
        progress = self.progress
        progress.updates += len(infos)
        progress.rows += size
        progress.seconds += seconds
        cpu_seconds = time.process_time() - cpu
        progress.cpu_seconds += cpu_seconds
        samples = sum(info.samples for info in infos)
        log_likelihood = progress.train = sum(info.log_likelihood * info.samples for info in infos) / samples
        observed = float((self._train[order.to(self._run.device)] >= 0).sum()) / size
        return {
            **likelihoods("train", log_likelihood, observed),
            "train/impossible": float(sum(info.impossible for info in infos)),
            **of_updates(infos),
            "cost/updates": float(progress.updates),
            "cost/rows": float(progress.rows),
            "time/step_ms": 1e3 * seconds,
            "time/train_s": progress.seconds,
            "time/epoch_cpu_s": cpu_seconds,
            "time/cpu_s": progress.cpu_seconds,
            "time/rows_per_s": size / seconds,
        }

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint from which learning goes on."""
        return {"rule": self.rule.state_dict(), "progress": self.progress.state()}

    def _update(self) -> StepInfo:
        """Sums what all workers have gathered; then all make the same update."""
        if self._run.world_size > 1:
            sum_over_workers(list(self.rule.accumulated().values()))
        try:
            return self.rule.update()
        except ValueError as error:
            raise PisteError(
                f"update {self.rule.updates + 1}: {error}: raise rule.pseudocount or train.batch, "
                "or begin with a circuit that has no zeros"
            ) from error


def sum_over_workers(tensors: Sequence[Tensor]) -> None:
    """Sums tensors over all workers, in place; those of one type in one exchange."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        mine = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in mine])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(mine, torch.split(flat, [tensor.numel() for tensor in mine]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _ended(config: Config, progress: Progress, epoch: int) -> bool:
    """Whether that epoch is the last one."""
    patience = config.train.patience
    return epoch >= config.train.epochs or (patience > 0 and progress.since >= patience)


def _with(circuit: Circuit, best: Mapping[str, Tensor]) -> Circuit:
    """A circuit with the parameters of the best validation, where they are kept; else the circuit itself."""
    return Circuit(circuit.structure, best) if best else circuit


def state_of(
    circuit: Circuit, encoding: Encoding, best: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """The part of a checkpoint that answers the verbs.

    Args:
        circuit: As it is now.
        encoding: What its categories mean.
        best: The parameters that answer instead, where they are kept.
    """
    return {
        "circuits": FORMAT,
        "structure": json.dumps(to_json(circuit.structure)),
        "model": circuit.parameters(),
        "best": dict(best or {}),
        "encoding": encoding.state(),
    }


def restored(state: dict[str, Any]) -> Circuit:
    """The circuit of a checkpoint, as it was then.

    Raises:
        CheckpointError: It is not one of this workload, or of another version of it.
    """
    found = state.get("circuits")
    if found != FORMAT:
        what = "not one of the workload circuits" if found is None else f"of version {found}, not {FORMAT}"
        raise CheckpointError(f"checkpoint: {what}: use the version of piste that made it")
    try:
        return Circuit(from_json(json.loads(state["structure"])), state["model"])
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {error}") from error


def answering(state: dict[str, Any]) -> Circuit:
    """The circuit of a checkpoint that answers the verbs: that of the best validation, where it is kept.

    Raises:
        CheckpointError: As `restored`.
    """
    return _with(restored(state), state.get("best", {}))
