"""Quantization-aware training: what it starts from, that it learns, and that no step makes a NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.workloads.local_runs import LocalRun, RunOf

from piste.checkpoints import CheckpointError, load
from piste.config import override, validate
from piste.errors import BadInput
from piste.running import resolve
from piste_workloads import images, quantization
from piste_workloads.images.task import Classification
from piste_workloads.quantization.config import Config
from piste_workloads.quantization.lsq import SMALLEST, Quantizer
from piste_workloads.quantization.train import network_of, step_table

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
COMMON: dict[str, Any] = {
    "model": {"name": "conv", "width": 4},
    "data": {"name": "digits", "samples": 300},
    "train": {"epochs": 3, "batch": 30},
    "optimizer": SGD,
}

ConfigOf = Callable[..., Config]


@pytest.fixture
def config_of() -> ConfigOf:
    def build(overrides: Mapping[str, Any] | None = None) -> Config:
        return validate(Config, override({**COMMON, "workload": "quantization"}, overrides or {}), "test")

    return build


@pytest.fixture
def full_precision(run_of: RunOf) -> LocalRun:
    table = override(COMMON, {"workload": "images", "train.epochs": 6})
    return run_of(images, resolve(table, "test"))


def newest(run: LocalRun) -> Path:
    return max((run.directory / "checkpoints").glob("step-*"))


def quantizers(model: torch.nn.Module) -> list[Quantizer]:
    return [module for module in model.modules() if isinstance(module, Quantizer)]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_learns_from_scratch(bits: int, run_of: RunOf, config_of: ConfigOf) -> None:
    run = run_of(quantization, config_of({"quantization.bits": bits, "train.epochs": 8}))
    assert run.history("test/accuracy")[-1][1] > 0.6  # ten classes
    # 8 x 4 x 9 and 16 x 8 x 9 weights between the ends; 1 x 4 x 9 and 16 x 10 at the ends, of a byte each;
    # 10 biases, 2 x 28 of batch norms and 8 steps in float32
    ((step, size),) = run.history("quantization/weight_bytes")
    assert step == 1
    assert size == (288 + 1152) * bits / 8 + 36 + 160 + 4 * (10 + 56 + 8)


def test_eight_bits_of_a_trained_network_are_as_good(
    full_precision: LocalRun, run_of: RunOf, config_of: ConfigOf
) -> None:
    reached = full_precision.history("test/accuracy")[-1][1]
    assert reached > 0.8
    start = {"init_from": str(newest(full_precision)), "optimizer.lr": 0.0, "train.epochs": 1}
    at = {
        bits: run_of(quantization, config_of({**start, "quantization.bits": bits})).history("test/accuracy")
        for bits in (2, 8)
    }
    # lr = 0: only the running statistics of the batch norms have moved.
    assert abs(at[8][-1][1] - reached) < 0.05
    assert at[2][-1][1] < reached - 0.1
    tuning = {"quantization.bits": 2, "optimizer.lr": 0.05, "train.epochs": 4}
    tuned = run_of(quantization, config_of(start | tuning))
    assert tuned.history("test/accuracy")[-1][1] > at[2][-1][1] + 0.1


def test_a_run_starts_from_the_weights_of_the_checkpoint(
    full_precision: LocalRun, config_of: ConfigOf
) -> None:
    config = config_of({"init_from": str(newest(full_precision))})
    model = network_of(config, Classification(config, torch.device("cpu")), seed=5)
    state = load(newest(full_precision))["model"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    rows = step_table(model)
    assert [row["bits"] for row in rows] == [8, 4, 4, 8]
    assert [row["signed_input"] for row in rows] == [True, False, False, False]
    assert all(row["weight_step"] > 0.0 and row["input_step"] > 0.0 for row in rows)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ({"name": "mlp", "hidden": [8, 8]}, 3),
        ({"name": "conv", "width": 4}, 4),
        (
            {"name": "resnet", "width": 4},
            1 + 3 * 2 + 2 + 1,
        ),  # the stem, three blocks, two projections, the head
        ({"name": "wide_resnet", "depth": 10, "width": 1}, 1 + 3 * 2 + 2 + 1),
    ],
)
def test_every_network_is_quantized_between_its_ends(
    model: dict[str, Any], layers: int, config_of: ConfigOf
) -> None:
    config = config_of({"model": model, "quantization.bits": 3, "quantization.ends": 6})
    rows = step_table(network_of(config, Classification(config, torch.device("cpu")), seed=0))
    assert len(rows) == layers
    assert [row["bits"] for row in rows] == [6, *[3] * (layers - 2), 6]
    # Behind a ReLU nothing is negative; the images are.
    assert [row["signed_input"] for row in rows] == [True, *[False] * (layers - 1)]


def test_another_seed_is_another_start_but_for_the_data(config_of: ConfigOf) -> None:
    config = config_of()
    task = Classification(config, torch.device("cpu"))
    first, again, other = (network_of(config, task, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


@pytest.mark.parametrize("optimizer", ["sam", "arsam"])
def test_steps_that_the_ascent_drives_below_zero_make_no_nan(
    optimizer: str, run_of: RunOf, config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = 0
    original = Quantizer.forward

    def forward(self: Quantizer, values: torch.Tensor, count: int) -> torch.Tensor:
        nonlocal below
        below += int(self.step.item() < self.smallest.item())
        return original(self, values, count)

    monkeypatch.setattr(Quantizer, "forward", forward)
    # A radius of 20 is a hundred times what is used.
    wrapped = {"name": optimizer, "rho": 20.0, "base": SGD}
    run = run_of(quantization, config_of({"optimizer": wrapped, "quantization.bits": 2}))
    assert below > 0
    losses = [loss for _, loss in run.history("train/loss")]
    assert len(losses) == 3 * (270 // 30)
    assert all(math.isfinite(loss) for loss in losses)
    assert all(tensor.isfinite().all() for tensor in load(newest(run))["model"].values())


def test_learns_in_bfloat16(run_of: RunOf, config_of: ConfigOf) -> None:
    run = run_of(quantization, config_of({"train.bf16": True, "train.epochs": 8}))
    assert run.history("test/accuracy")[-1][1] > 0.6


def test_the_smallest_step_is_a_thousandth_of_the_first(config_of: ConfigOf) -> None:
    config = config_of()
    model = network_of(config, Classification(config, torch.device("cpu")), seed=0)
    for quantizer in quantizers(model):
        assert quantizer.smallest.item() == pytest.approx(SMALLEST * quantizer.step.item(), rel=1e-6)


def test_the_hash_follows_the_checkpoint(full_precision: LocalRun, config_of: ConfigOf) -> None:
    folders = sorted((full_precision.directory / "checkpoints").glob("step-*"))
    scratch = quantization.prepare_data(config_of())
    started = quantization.prepare_data(config_of({"init_from": str(folders[-1])}))
    assert scratch != started
    assert quantization.prepare_data(config_of({"data.label_noise": 0.5})) != scratch


def test_what_cannot_be_started_from_is_said_in_one_line(
    full_precision: LocalRun, run_of: RunOf, config_of: ConfigOf, tmp_path: Path
) -> None:
    start = str(newest(full_precision))
    quantized = run_of(quantization, config_of({"train.epochs": 1}))
    for settings, error, message in (
        ({"init_from": str(tmp_path / "nowhere")}, BadInput, "not a checkpoint's folder"),
        ({"init_from": start, "model.width": 8}, CheckpointError, "another architecture"),
        ({"init_from": str(newest(quantized))}, CheckpointError, "has no place in this model"),
        ({"init_from": start, "data.name": "photo_patches"}, BadInput, "10 other classes apart"),
        ({"train.batch": 300}, BadInput, "there are 270 training examples"),
    ):
        with pytest.raises(error, match=message) as caught:
            quantization.prepare_data(config_of(settings))
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="has no sharpness to measure"):
        config_of({"train.sharpness_examples": 8})
    for bits in (1, 9):
        with pytest.raises(BadInput, match=r"quantization\.bits"):
            config_of({"quantization.bits": bits})
