"""The training loop: one worker or many, one optimizer pass or several, fresh or resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from piste.building import build_optimizer, state_bytes
from piste.checkpoints import load_model
from piste.errors import BadInput, PisteError
from piste.workload import Run
from piste_workloads.hardware import no_sync, now, precision
from piste_workloads.schedule import lr_factor
from piste_workloads.supervised.config import SupervisedRecipe
from piste_workloads.supervised.evaluation import evaluate, top_eigenvalue
from piste_workloads.supervised.pictures import draw
from piste_workloads.supervised.progress import Progress
from piste_workloads.supervised.randomness import generator_at, order_of
from piste_workloads.supervised.task import Task

TOLD_BY_OPTIMIZERS = ("sam_fraction", "psf_norm", "psf_ratio")


def check(config: SupervisedRecipe, sizes: Mapping[str, int]) -> int:
    """Whether a recipe can train on so many examples; returns the steps of an epoch.

    Args:
        config: The recipe.
        sizes: How many examples each part has, as `Task.sizes`.

    Raises:
        BadInput: There are fewer examples than a batch has, or a part with fewer than there are workers; the
            warm-up does not end.
    """
    train, size = config.train, sizes["train"]
    if size < train.batch:
        raise BadInput(
            f"train.batch = {train.batch}, but there are {size} training examples: lower it or use more data"
        )
    for part, held_out in sizes.items():
        if held_out < config.resources.workers:
            raise BadInput(
                f"data: the {part} part has {held_out} examples for resources.workers = "
                f"{config.resources.workers}: use more data or fewer workers"
            )
    steps = train.epochs * (size // train.batch)
    if train.warmup_steps >= steps:
        raise BadInput(f"train.warmup_steps = {train.warmup_steps} must be below the run's {steps} steps")
    return size // train.batch


def fit(config: SupervisedRecipe, run: Run, model: nn.Module, task: Task) -> None:
    """Trains a network and leaves metrics, pictures and checkpoints behind.

    An epoch is a random order of the training examples in whole batches; what is left over waits for the next
    one. Logged are, with SCORE one of the task's scores:

    - each step: `train/loss` and `train/SCORE` before the step (means over workers), `train/lr` (of the first
      group);
    - each epoch: `cost/gradient_evaluations` (so far), `cost/gradient_evaluations_per_step` (of the epoch),
      `time/epoch_s` and `time/epoch_cpu_s` (rank 0 in training steps, by the clock and over its threads),
      `time/cpu_s` (so far), and, where the optimizer has them, `optimizer/sam_fraction`, `optimizer/psf_norm`
      and `optimizer/psf_ratio`;
    - as the recipe says: `valid/loss`, `valid/SCORE`, `sharpness/top_eigenvalue`; at the end `test/loss` and
      `test/SCORE`, which nothing is chosen by.

    An optimizer that has `notify` is told the validation part's `task.score`.

    Args:
        config: The recipe.
        run: The run.
        model: The network, its first weights drawn.
        task: What it is to learn, on the run's device.

    Raises:
        BadInput: As `check`.
        PisteError: The loss has not been finite for `train.non_finite_steps` steps.
        CheckpointError: The checkpoint to resume from is of another architecture.
    """
    per_epoch = check(config, task.sizes)
    steps = config.train.epochs * per_epoch
    optimizer = build_optimizer(config.optimizer, model, total_steps=steps)
    # The recipe's learning rate of each group; the schedule multiplies it.
    lrs = [group.get("lr", 0.0) for group in optimizer.param_groups]
    training = _Training(config, run, model, optimizer, task)

    order = torch.empty(0)
    non_finite = 0
    start = training.resume()
    for step in range(start + 1, steps + 1):
        epoch, place = divmod(step - 1, per_epoch)
        if place == 0 or step == start + 1:
            order = order_of(epoch, run.seed, task.sizes["train"])
        factor = lr_factor(config.train, step, steps)
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            if "lr" in group:
                group["lr"] = factor * lr
        batch = order[place * config.train.batch : (place + 1) * config.train.batch]
        metrics = training.step(step, batch)
        run.log(metrics, step)
        if step == 1:
            run.log({"optimizer/state_bytes": state_bytes(optimizer)}, step)
        non_finite = 0 if math.isfinite(metrics["train/loss"]) else non_finite + 1
        if non_finite == config.train.non_finite_steps:
            raise PisteError(
                f"the loss has not been finite since step {step - non_finite + 1}: "
                "lower optimizer.lr or lengthen train.warmup_steps"
            )

        ended = place == per_epoch - 1
        reported = training.end_epoch(epoch + 1, per_epoch, step == steps) if ended else {}
        stop = run.mean(float(run.should_stop)) > 0.0  # asked on one worker, agreed on by all
        if stop or config.checkpoints.due(step, steps):
            run.report(reported, step, checkpoint=training.state())
        elif reported:
            run.report(reported, step)
        if stop:
            return
    draw(run, training.progress.rows, task.score)


class _Training:
    """A network in training: its steps, what is measured after an epoch, and its state."""

    def __init__(
        self,
        config: SupervisedRecipe,
        run: Run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        task: Task,
    ) -> None:
        self.progress = Progress()
        self._config = config
        self._run = run
        self._model = model
        self._optimizer = optimizer
        self._task = task
        self._network = run.prepare(model)
        self._precision = precision(config.train.bf16, run.device)
        self._share = torch.tensor(run.shard(list(range(config.train.batch))))

    def resume(self) -> int:
        """Continues from the newest checkpoint, where there is one; returns its step, or 0."""
        state = self._run.restore()
        if state is None:
            return 0
        load_model(self._model, state["model"], f"checkpoint of step {state['step']}")
        self._optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        return int(state["step"])

    def state(self) -> dict[str, Any]:
        """A checkpoint's content; the order of the data and the learning rate follow from the step."""
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "progress": dict(vars(self.progress)),
            **self._task.kept,
        }

    def step(self, step: int, indices: Tensor) -> dict[str, float]:
        """Takes one step with a batch `(batch,)` of all workers; returns its metrics."""
        run, parts = self._run, self._config.train.accumulate
        started, started_cpu = now(run.device), time.process_time()
        generator = generator_at(step, run.seed, run.device)
        inputs, targets = self._task.batch(indices, self._share, generator)
        micro_batches = list(zip(inputs.chunk(parts), targets.chunk(parts), strict=True))
        passes: list[dict[str, float]] = []  # what every call of the closure found

        def closure() -> Tensor:
            self._optimizer.zero_grad()
            loss, scores = self._forward_and_backward(micro_batches)
            passes.append(scores)
            return loss

        self._network.train()
        self._optimizer.step(closure)  # type: ignore[arg-type]
        self.progress.spend(len(passes), now(run.device) - started, time.process_time() - started_cpu)
        # The first pass is where the step began.
        metrics = {f"train/{key}": run.mean(value) for key, value in passes[0].items()}
        return metrics | {"train/lr": float(self._optimizer.param_groups[0].get("lr", 0.0))}

    def _forward_and_backward(
        self, micro_batches: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, dict[str, float]]:
        """Adds the gradients of this worker's share; returns its mean loss, and that with its mean scores."""
        total = torch.zeros((), device=self._run.device)
        sums: dict[str, Tensor] = {}
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            # Workers exchange gradients once a step, behind the last micro-batch.
            with no_sync(self._network) if number < len(micro_batches) else nullcontext():
                with self._precision:
                    outputs = self._network(inputs)
                loss = self._task.loss(outputs.float(), targets) / len(micro_batches)
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            for key, values in self._task.scores(outputs.detach().float(), targets).items():
                sums[key] = sums.get(key, 0.0) + values.mean() / len(micro_batches)
        # The loss is the one that is minimised, not the one that is reported of held-out examples.
        return total, {key: float(value) for key, value in {**sums, "loss": total}.items()}

    def end_epoch(self, epoch: int, steps: int, last: bool) -> dict[str, float]:
        """Measures what is due after an epoch.

        Args:
            epoch: Its number, counted from 1.
            steps: How many it had.
            last: Whether it is the run's last one.
        """
        train, task = self._config.train, self._task
        metrics = self.progress.end_epoch(steps)
        chain = list(_chain(self._optimizer))
        for name in TOLD_BY_OPTIMIZERS:
            told = [getattr(each, name, None) for each in chain]
            metrics |= {f"optimizer/{name}": float(value) for value in told if value is not None}
        for part, every in (("valid", train.validate_every), ("test", train.test_every)):
            if part in task.sizes and (last or _every(every, epoch)):
                metrics |= evaluate(self._config, self._run, self._network, self._model, task, part)
        score = metrics.get(f"valid/{task.score}")
        for each in chain:
            if score is not None and hasattr(each, "notify"):
                each.notify(score)
        if train.sharpness_examples and (last or _every(train.sharpness_every, epoch)):
            metrics["sharpness/top_eigenvalue"] = top_eigenvalue(self._config, self._model, task)
        self.progress.rows.append({**metrics, "seconds": self.progress.seconds})
        return metrics


def _chain(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """An optimizer and, innermost last, those that it wraps."""
    found: torch.optim.Optimizer | None = optimizer
    while found is not None:
        yield found
        found = getattr(found, "base", None)


def _every(period: int, epoch: int) -> bool:
    return period > 0 and epoch % period == 0
