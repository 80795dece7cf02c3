"""Training: epochs of steps, a validation after each, and what it says about grokking at the end."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from piste.building import build_optimizer, parameter_groups
from piste.catalog import load_optimizer
from piste.checkpoints import load_model
from piste.packing import PackedRuns, single_optimizer
from piste.workload import Run
from piste_algorithms.stacked import stack, stack_key
from piste_workloads.data import load
from piste_workloads.grokking.config import Config, Digits, Transformer
from piste_workloads.grokking.curves import Curves
from piste_workloads.grokking.networks import network
from piste_workloads.grokking.points import Points, seeded
from piste_workloads.grokking.tasks import correct, dataset, loss
from piste_workloads.hardware import now
from piste_workloads.schedule import lr_factor


def prepare_data(config: Config) -> str:
    """The hash of what is not drawn from the seed: the digits.

    Raises:
        BadInput: They cannot be had.
    """
    return load("mnist5k").meta.sha256 if isinstance(config.task, Digits) else ""


def order_of(config: Config, seed: int, epoch: int) -> Tensor:
    """The training points of an epoch's steps, `(batches, batch)`, from the seed and the epoch alone."""
    order = torch.randperm(config.task.train_points, generator=seeded(seed, f"epoch {epoch}"))
    return order[: config.batches * config.batch].view(config.batches, config.batch)


def train(config: Config, run: Run) -> None:
    """Trains; a step of the metrics is an epoch.

    Logs, every `evaluate_every` epochs and after the last, `train/loss` and `train/accuracy` (means over the
    epoch's batches, before each step), `valid/accuracy`, `time/epoch_ms`, every `test_every` epochs and after
    the last `test/accuracy`, and at the end what `Curves.grokking` gives, with the picture `accuracy`. An
    optimizer that listens (`notify`) is told each validation accuracy.
    """
    points = dataset(config, run.seed, run.device)
    model = network(config, run.seed)
    optimizer = build_optimizer(config.optimizer, model, config.train.epochs * config.batches)
    trainer = Trainer(config, run, run.prepare(model), optimizer, points.train)
    curves, last = Curves(), 0
    if (state := run.restore()) is not None:
        load_model(model, state["model"], f"checkpoint of step {state['step']}")
        optimizer.load_state_dict(state["optimizer"])
        curves, last = Curves(**state["curves"]), int(state["step"])
        trainer.seconds = float(state["seconds"])

    while not _ended(config, curves, last):
        last += 1
        train_loss, train_accuracy, seconds = trainer.epoch(last)
        final = last == config.train.epochs
        if final or last % config.train.evaluate_every == 0:
            accuracy = _accuracy(model, points.validation)
            curves.add(last, train_accuracy, accuracy, trainer.seconds)
            _notify(optimizer, accuracy)
            final = _ended(config, curves, last)
            metrics = {"train/loss": train_loss, "train/accuracy": train_accuracy, "valid/accuracy": accuracy}
            if final or last % config.train.test_every == 0:
                metrics["test/accuracy"] = _accuracy(model, points.test)
            run.log(metrics | {"time/epoch_ms": 1e3 * seconds}, last)
        stop = run.mean(float(run.should_stop)) > 0.0
        if stop or final or config.checkpoints.due(last, config.train.epochs):
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            run.report({}, last, checkpoint=kept | {"curves": curves.state(), "seconds": trainer.seconds})
        if stop and not final:
            return
    run.log(curves.grokking(config.train.target), last)
    run.figure("accuracy", curves.picture(f"{config.task.name}, {_name(config)}", config.train.target))


class Trainer:
    """Takes an epoch's steps.

    Attributes:
        seconds: What all epochs have taken, in earlier attempts too.
    """

    def __init__(
        self, config: Config, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, points: Points
    ) -> None:
        self.seconds = 0.0
        self._config, self._run, self._model = config, run, model
        self._optimizer, self._points = optimizer, points
        # The recipe's learning rate of each group; the schedule multiplies it.
        self._lrs = [group.get("lr") for group in optimizer.param_groups]

    def epoch(self, number: int) -> tuple[float, float, float]:
        """One epoch, counted from 1: mean loss and share of right answers before each step, and seconds."""
        began = now(self._run.device)
        losses, rights = torch.zeros(2, dtype=torch.float64, device=self._run.device)
        before = (number - 1) * self._config.batches
        for step, batch in enumerate(order_of(self._config, self._run.seed, number), start=before + 1):
            value, right = self._step(step, batch)
            losses += value
            rights += right
        count = self._config.batches
        found = self._run.mean(float(losses) / count), self._run.mean(float(rights) / count)
        seconds = now(self._run.device) - began
        self.seconds += seconds
        return *found, seconds

    def _step(self, number: int, batch: Tensor) -> tuple[Tensor, Tensor]:
        factor = lr_factor(self._config.train, number, self._config.train.epochs * self._config.batches)
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            if lr is not None:
                group["lr"] = factor * lr
        mine = self._run.shard(batch.to(self._run.device))  # type: ignore[type-var]
        inputs, targets = self._points.inputs[mine], self._points.targets[mine]
        rights: list[Tensor] = []

        def closure() -> Tensor:
            self._optimizer.zero_grad()
            outputs = self._model(inputs)
            value = loss(self._config, outputs, targets)
            value.backward()  # type: ignore[no-untyped-call]
            rights.append(correct(outputs.detach(), targets).float().mean())
            return value.detach()

        value: Tensor = self._optimizer.step(closure)  # type: ignore[arg-type, assignment]
        return value, rights[0]  # where the step began


@torch.no_grad()
def _accuracy(model: nn.Module, points: Points) -> float:
    return float(correct(model(points.inputs), points.targets).float().mean())


def _notify(optimizer: torch.optim.Optimizer, accuracy: float) -> None:
    """Tells the optimizer, and those that it wraps, the validation accuracy, where they listen."""
    listener: torch.optim.Optimizer | None = optimizer
    while listener is not None:
        if hasattr(listener, "notify"):
            listener.notify(accuracy)
        listener = getattr(listener, "base", None)


def _ended(config: Config, curves: Curves, epoch: int) -> bool:
    """Whether that epoch is the last one."""
    more, reached = config.train.epochs_after_target, curves.reached(config.train.target)
    early = more is not None and reached is not None and epoch >= reached + more
    return epoch >= config.train.epochs or early


def _name(config: Config) -> str:
    return " on ".join(section.name for section in config.optimizer.chain)


def pack_key(config: Config) -> Hashable | None:
    """Trials of equal `[task]`, `[model]` and `[train]` are packed, with optimizers that can be stacked.

    Not those that end early, and no transformers.
    """
    alike = config.train.epochs_after_target is None and not isinstance(config.model, Transformer)
    optimizer = single_optimizer(config.optimizer) if alike else None
    if optimizer is None:
        return None
    rule = stack_key(optimizer, config.optimizer.options)
    return None if rule is None else (rule, config.task, config.model, config.train)


def train_many(configs: Sequence[Config], runs: PackedRuns) -> None:
    """`train` for all trials of a pack at once, up to rounding and without times and pictures."""
    config, device = configs[0], runs.device
    seeds = list(dict.fromkeys(runs.seeds))
    points = [dataset(config, seed, device) for seed in seeds]
    networks = [network(config, seed) for seed in seeds]
    # Which of the seeds each trial has, (trials,), and the trials of each seed.
    start = torch.tensor([seeds.index(seed) for seed in runs.seeds], device=device)
    members = [(start == number).nonzero()[:, 0] for number in range(len(seeds))]
    inputs, targets = (torch.stack(parts) for parts in zip(*(each.train for each in points), strict=True))
    states, _ = stack_module_state(networks)
    parameters = {name: states[name].detach().to(device)[start] for name in states}

    section, model = config.optimizer, networks[0]
    options = [each.optimizer.options for each in configs]
    groups = parameter_groups(section, model)
    optimizer = stack(load_optimizer(section.name), model, groups, options, parameters)

    def loss_of(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs: Tensor = functional_call(model, parameters, (inputs,))
        return loss(config, outputs, targets), correct(outputs.detach(), targets).float().mean()

    step_of = vmap(grad_and_value(loss_of, has_aux=True))
    rights_of = vmap(
        lambda parameters, inputs, targets: loss_of(parameters, inputs, targets)[1], in_dims=(0, None, None)
    )

    @torch.no_grad()
    def accuracies(parts: Sequence[Points]) -> Tensor:
        found = torch.empty(len(runs), device=device)
        for part, trials in zip(parts, members, strict=True):
            found[trials] = rights_of({k: v[trials] for k, v in parameters.items()}, *part)
        return found

    curves = [Curves() for _ in configs]
    trials = torch.arange(len(seeds), device=device)[:, None]
    for epoch in range(1, config.train.epochs + 1):
        orders = torch.stack([order_of(config, seed, epoch) for seed in seeds], 1).to(device)
        total, rights = torch.zeros(2, len(runs), dtype=torch.float64, device=device)
        for step, batch in enumerate(orders, start=(epoch - 1) * config.batches + 1):  # (seeds, batch)
            gradients, (losses, right) = step_of(
                parameters, inputs[trials, batch][start], targets[trials, batch][start]
            )
            optimizer.scale_lr(lr_factor(config.train, step, config.train.epochs * config.batches))
            optimizer.step(gradients)
            total += losses
            rights += right
        final = epoch == config.train.epochs
        if final or epoch % config.train.evaluate_every == 0:
            validation = accuracies([each.validation for each in points])
            means = {"train/loss": total / config.batches, "train/accuracy": rights / config.batches}
            metrics = means | {"valid/accuracy": validation}
            if final or epoch % config.train.test_every == 0:
                metrics["test/accuracy"] = accuracies([each.test for each in points])
            runs.log(metrics, epoch)
            values = zip(curves, means["train/accuracy"].tolist(), validation.tolist(), strict=True)
            for curve, train_accuracy, accuracy in values:
                curve.add(epoch, train_accuracy, accuracy, 0.0)
    ends = [curve.grokking(config.train.target) for curve in curves]
    keys = [key for key in ends[0] if not key.startswith("time/")]
    runs.log({key: torch.tensor([end[key] for end in ends]) for key in keys}, config.train.epochs)
