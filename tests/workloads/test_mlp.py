"""The small MLP: its data, its student, what it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.workloads.local_runs import RunOf

from piste.checkpoints import load
from piste.config import Optimizer
from piste_workloads import mlp

CPU = torch.device("cpu")


def config(name: str = "adamw", lr: float = 1e-2, seed: int = 0, **sections: dict[str, object]) -> mlp.Config:
    optimizer = Optimizer.model_validate({"name": name, "lr": lr})
    return mlp.Config.model_validate({"optimizer": optimizer, "seed": seed, **sections})


def test_the_data_depend_on_their_own_seed_alone() -> None:
    first, again = (mlp.points(config(seed=seed), CPU) for seed in (0, 1))
    other = mlp.points(config(data={"seed": 1}), CPU)
    for part in range(2):
        assert torch.equal(first[part][0], again[part][0])
        assert torch.equal(first[part][1], again[part][1])
        assert not torch.equal(first[part][1], other[part][1])
    assert not torch.equal(first[0][0], first[1][0])


def test_the_targets_are_the_teachers_with_its_noise() -> None:
    settings = {"samples": 4000, "teacher": 3}
    clean, noisy = (mlp.points(config(data={**settings, "noise": noise}), CPU)[0] for noise in (0.0, 0.5))
    assert torch.equal(clean[0], noisy[0])
    noise = (noisy[1] - clean[1]).double()
    # chi^2 with 4000 degrees of freedom is within 6 sqrt(2 / 4000) of its mean but for 1e-8.
    assert float(noise.square().mean()) == pytest.approx(0.25, rel=6 * (2 / 4000) ** 0.5)
    assert abs(float(noise.mean())) < 6 * 0.5 / 4000**0.5


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_student_is_the_network_that_it_says(activation: str) -> None:
    settings = config(model={"hidden": [5, 7], "activation": activation}, train={"dtype": "float64"})
    student = mlp.MLP(settings, torch.Generator().manual_seed(0))
    weights = {name: p.detach().numpy() for name, p in student.named_parameters()}
    inputs = np.random.default_rng(0).standard_normal((6, 8))
    values = inputs
    bend = np.tanh if activation == "tanh" else lambda z: np.maximum(z, 0.0)
    for number, width in enumerate((8, 5)):
        w, b = weights[f"layers.{number}.weight"], weights[f"layers.{number}.bias"]
        assert max(np.abs(w).max(), np.abs(b).max()) <= width**-0.5
        values = bend(values @ w.T + b)
    expected = values @ weights["head.weight"][0] + weights["head.bias"]
    with torch.no_grad():
        np.testing.assert_allclose(student(torch.from_numpy(inputs)).numpy(), expected, rtol=1e-12)


def test_seeds_differ_in_the_start_and_in_the_order_of_the_points(run_of: RunOf) -> None:
    losses = [
        run_of(mlp, config("sgd", 0.0, seed, train={"steps": 8})).history("train/loss") for seed in (0, 1)
    ]
    assert losses[0] != losses[1]
    # Nothing is learned with lr = 0, so a loss can only change with the batch.
    assert len({loss for _, loss in losses[0]}) == 8


def test_the_first_step_is_the_gradient_of_the_mean_squared_error(run_of: RunOf) -> None:
    settings = config("sgd", 0.1, train={"steps": 1, "batch": 256, "dtype": "float64"}, data={"samples": 1})
    (inputs, targets), _ = mlp.points(settings, CPU)
    student = mlp.MLP(settings, torch.Generator().manual_seed(0))
    finished = run_of(mlp, settings)
    error = float(student(inputs)[0].detach() - targets[0])
    ((step, loss),) = finished.history("train/loss")
    assert step == 1
    assert loss == pytest.approx(error**2, rel=1e-12)
    state = load(finished.directory / "checkpoints" / "step-000000001")
    # d (f - y)^2 / d c = 2 (f - y)
    moved = float(state["model"]["head.bias"][0] - student.head.bias[0].detach())
    assert moved == pytest.approx(-0.1 * 2 * error, rel=1e-10)


@pytest.mark.parametrize(("name", "lr"), [("sgd", 0.1), ("adamw", 3e-2), ("reg", 3e-2)])
def test_learns(name: str, lr: float, run_of: RunOf) -> None:
    finished = run_of(mlp, config(name, lr, train={"steps": 300, "validate_every": 100}))
    losses = finished.history("valid/loss")
    assert [step for step, _ in losses] == [100, 200, 300]
    variance = float(mlp.points(config(), CPU)[1][1].var())
    assert losses[-1][1] < 0.1 * variance
    assert losses[-1][1] > 0.5 * 0.1**2  # the noise of 256 points; half of it is 5 deviations below


def test_a_batch_that_workers_cannot_share_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"train.batch = 32 cannot be shared by resources.workers = 3"):
        config(resources={"workers": 3})
