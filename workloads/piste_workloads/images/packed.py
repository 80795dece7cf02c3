"""Many trials with a small MLP as one tensor program."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from piste.building import parameter_groups
from piste.catalog import load_optimizer
from piste.packing import PackedRuns, single_optimizer
from piste_algorithms.stacked import stack, stack_key
from piste_workloads.images.config import Config
from piste_workloads.images.task import Classification
from piste_workloads.images.train import network_of
from piste_workloads.schedule import lr_factor
from piste_workloads.supervised import check
from piste_workloads.supervised.randomness import generator_at, order_of

Parameters = dict[str, Tensor]  # (trials, ...) each


def pack_key(config: Config) -> Hashable | None:
    """MLPs of equal `[model]`, `[data]`, `[augmentation]` and `[train]` with optimizers that can be stacked.

    A trial runs alone that measures sharpness, accumulates micro-batches or uses bfloat16.
    """
    optimizer = single_optimizer(config.optimizer)
    rule = None if optimizer is None else stack_key(optimizer, config.optimizer.options)
    train = config.train
    float32 = train.bf16 is False or (train.bf16 == "auto" and config.resources.gpus_per_worker == 0)
    plain = train.sharpness_examples == 0 and train.accumulate == 1 and float32
    if rule is None or config.model.name != "mlp" or not plain:
        return None
    return (rule, config.model, config.data, config.augmentation, train)


def train_many(configs: Sequence[Config], runs: PackedRuns) -> None:
    """`train` for all trials of a pack at once, up to rounding; one that diverges goes on."""
    config = configs[0]
    task = Classification(config, runs.device)
    per_epoch = check(config, task.sizes)
    steps = config.train.epochs * per_epoch
    seeds = list(dict.fromkeys(runs.seeds))
    # Which of the seeds each trial has, (trials,).
    seed_of = torch.tensor([seeds.index(seed) for seed in runs.seeds], device=runs.device)
    networks = [network_of(config, task, seed).to(runs.device) for seed in seeds]
    states, _ = stack_module_state(networks)
    parameters = {name: states[name].detach()[seed_of] for name in states}
    section, network = config.optimizer, networks[0]
    options = [each.optimizer.options for each in configs]
    groups = parameter_groups(section, network)
    optimizer = stack(load_optimizer(section.name), network, groups, options, parameters)

    def outputs_of(parameters: Parameters, inputs: Tensor) -> Tensor:
        outputs: Tensor = functional_call(network, parameters, (inputs,))
        return outputs

    def loss_of(parameters: Parameters, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs = outputs_of(parameters, inputs)
        return task.loss(outputs, targets), task.scores(outputs, targets)["accuracy"].mean()

    gradients_of = vmap(grad_and_value(loss_of, has_aux=True))

    @torch.no_grad()
    def evaluate(part: str) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for first in range(0, task.sizes[part], config.train.evaluation_batch):
            last = min(first + config.train.evaluation_batch, task.sizes[part])
            inputs, targets = task.examples(part, torch.arange(first, last))
            found = vmap(lambda own: task.scores(outputs_of(own, inputs), targets))(parameters)  # noqa: B023
            for key, values in found.items():
                sums[key] = sums.get(key, 0.0) + values.double().sum(1)
        return {f"{part}/{key}": value / task.sizes[part] for key, value in sums.items()}

    share = torch.arange(config.train.batch)
    for step in range(1, steps + 1):
        epoch, place = divmod(step - 1, per_epoch)
        if place == 0:
            orders = [order_of(epoch, seed, task.sizes["train"]) for seed in seeds]
        cut = slice(place * config.train.batch, (place + 1) * config.train.batch)
        batches = [
            task.batch(order[cut], share, generator_at(step, seed, runs.device))
            for order, seed in zip(orders, seeds, strict=True)
        ]
        inputs, targets = (torch.stack(parts)[seed_of] for parts in zip(*batches, strict=True))
        optimizer.scale_lr(lr_factor(config.train, step, steps))
        gradients, (losses, accuracies) = gradients_of(parameters, inputs, targets)
        runs.log({"train/loss": losses, "train/accuracy": accuracies}, step)
        optimizer.step(gradients)
        if place == per_epoch - 1:
            last = step == steps
            runs.log({"cost/gradient_evaluations": torch.full_like(losses, step)}, step)
            for part, every in (("valid", config.train.validate_every), ("test", config.train.test_every)):
                if part in task.sizes and (last or (every > 0 and (epoch + 1) % every == 0)):
                    runs.log(evaluate(part), step)
