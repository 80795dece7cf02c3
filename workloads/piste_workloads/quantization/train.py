"""Training of a quantized image classifier, from scratch or from a network in full precision."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from piste.checkpoints import MANIFEST, load, load_model
from piste.errors import BadInput
from piste.workload import Run
from piste_workloads.images.networks import build_network
from piste_workloads.images.task import Classification, data_hash
from piste_workloads.quantization.config import Config
from piste_workloads.quantization.lsq import QuantizedConv2d, QuantizedLinear, quantize_model, weight_bytes
from piste_workloads.supervised import check, fit


def prepare_data(config: Config) -> str:
    """Reads the images once, before any worker, so that the workers find them decoded.

    Returns:
        The hash of everything that the run starts from: images, labels and the checkpoint of `init_from`.

    Raises:
        BadInput: The images cannot be had, or are too few; `init_from` is no checkpoint of the workload
            images, or one for other classes.
        CheckpointError: It is of another architecture.
    """
    images = data_hash(config)
    task = Classification(config, torch.device("cpu"))
    check(config, task.sizes)
    if config.init_from is None:
        return images
    network_of(config, task, config.seed)
    manifest = hashlib.sha256((config.init_from / MANIFEST).read_bytes()).hexdigest()
    return hashlib.sha256(f"{images}{manifest}".encode()).hexdigest()


def _full_precision(config: Config, task: Classification) -> dict[str, Any]:
    """The checkpoint that a run starts from."""
    assert config.init_from is not None
    if not (config.init_from / MANIFEST).exists():
        raise BadInput(
            f"init_from: {config.init_from}: not a checkpoint's folder (runs/ID/checkpoints/step-N)"
        )
    state = load(config.init_from)
    if "classes" not in state:
        raise BadInput(f"init_from: {config.init_from}: not a checkpoint of the workload images")
    if tuple(state["classes"]) != task.classes:
        raise BadInput(
            f"init_from: {config.init_from}: it tells {len(state['classes'])} other classes apart than those "
            f"of data.name = {config.data.name!r}: use the data set that it was trained on"
        )
    return state


def train(config: Config, run: Run) -> None:
    """Trains a quantized network; leaves behind what `piste_workloads.supervised.fit` does.

    Also logged, at the first step: `quantization/weight_bytes`, what the weights take. The table `steps` has
    each layer's bits and what its steps have become.

    Raises:
        BadInput: As `prepare_data` and `fit`.
        PisteError: As `fit`.
        CheckpointError: The checkpoint of `init_from` is of another architecture.
    """
    task = Classification(config, run.device)
    model = network_of(config, task, run.seed)
    run.log({"quantization/weight_bytes": weight_bytes(model)}, 1)
    fit(config, run, model, task)
    if run.stopped is None and run.rank == 0:
        run.table("steps", step_table(model))


def network_of(config: Config, task: Classification, seed: int) -> nn.Module:
    """The recipe's network, quantized, on the task's device.

    Its steps are set by a batch of training images as they are: the same for every worker, and again when a
    run is resumed.

    Args:
        config: The recipe.
        task: The images.
        seed: Draws the first weights, where they do not come from `init_from`.
    """
    channels, side, _ = task.shape
    generator = torch.Generator().manual_seed(seed)
    model = build_network(config.model, channels, side, len(task.classes), generator)
    if config.init_from is not None:
        load_model(model, _full_precision(config, task)["model"], f"init_from: {config.init_from}")
    size = task.sizes["train"]
    count = min(config.train.batch, size)
    inputs, _ = task.examples("train", torch.arange(count) * size // count)  # spread over the classes
    quantize_model(model.to(inputs.device), config.quantization.bits, inputs, config.quantization.ends)
    return model


def step_table(model: nn.Module) -> list[dict[str, Any]]:
    """One row a quantized layer: its name, its bits, and how long its steps are."""
    return [
        {
            "layer": name,
            "bits": layer.weight_quantizer.bits,
            "signed_input": bool(layer.input_quantizer.signed),
            "weight_step": layer.weight_quantizer.step.item(),
            "input_step": layer.input_quantizer.step.item(),
        }
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedConv2d | QuantizedLinear)
    ]
