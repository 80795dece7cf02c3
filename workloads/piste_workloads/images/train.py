"""Training of an image classifier."""

from __future__ import annotations

import torch
from torch import nn

from piste.workload import Run
from piste_workloads.images.config import Config
from piste_workloads.images.networks import build_network
from piste_workloads.images.task import Classification, data_hash
from piste_workloads.supervised import fit


def prepare_data(config: Config) -> str:
    """Reads the images once, before any worker, so that the workers find them decoded.

    Returns:
        The hash of images and labels.

    Raises:
        BadInput: The images cannot be had, or are too few.
    """
    return data_hash(config)


def train(config: Config, run: Run) -> None:
    """Trains a network from its start; leaves behind what `piste_workloads.supervised.fit` does.

    Its table `data` says where the images come from, and what was left out of them.

    Raises:
        BadInput: As `prepare_data` and `fit`.
        PisteError: As `fit`.
    """
    task = Classification(config, run.device)
    run.table("data", task.table())
    fit(config, run, network_of(config, task, run.seed), task)


def network_of(config: Config, task: Classification, seed: int) -> nn.Module:
    """The recipe's network for a task's images, with first weights drawn from a seed."""
    channels, side, _ = task.shape
    generator = torch.Generator().manual_seed(seed)
    return build_network(config.model, channels, side, len(task.classes), generator)
