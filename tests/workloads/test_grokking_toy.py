"""The toy of unequal speeds: its points against their distribution, its closed forms against runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from tests.workloads.local_runs import RunOf

from piste_workloads import grokking
from piste_workloads.grokking.config import Config, Toy
from piste_workloads.grokking.networks import network
from piste_workloads.grokking.points import seeded
from piste_workloads.grokking.tasks import dataset
from piste_workloads.grokking.toy import (
    accuracy_of,
    least_squares,
    moments,
    plateau_steps,
    training_points,
    weights_after,
)

STEP_SIZE = 0.2


def points(task: Toy) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    inputs, targets = training_points(task, seeded(0, "points"))
    return inputs.numpy(), targets.numpy()


@pytest.mark.parametrize("margin", [0.0, 0.5, 2.0])
def test_moments_are_those_of_the_truncated_normal(margin: float) -> None:
    reference = stats.truncnorm(margin, np.inf)
    first, second = moments(margin)
    assert first == pytest.approx(reference.mean(), rel=1e-10)
    assert second == pytest.approx(reference.var() + reference.mean() ** 2, rel=1e-10)


@pytest.mark.parametrize("margin", [0.0, 0.5, 2.0])
def test_eight_points_have_the_moments_of_the_population(margin: float) -> None:
    inputs, targets = points(Toy(margin=margin, epsilon=0.03))
    first, second = moments(margin)
    assert len(inputs) == 8
    np.testing.assert_allclose(inputs.T @ inputs / 8, np.diag([second, 0.03]), atol=1e-12)
    np.testing.assert_allclose(inputs.T @ targets / 8, [first, 0.0], atol=1e-12)
    np.testing.assert_array_equal(np.sign(inputs[:, 0]), targets)


def test_a_sample_has_the_populations_distribution() -> None:
    inputs, targets = points(Toy(samples=20_000, epsilon=0.04, margin=0.5))
    sizes, slow = np.abs(inputs[:, 0]), inputs[:, 1]
    assert sizes.min() >= 0.5
    assert stats.kstest(sizes, stats.truncnorm(0.5, np.inf).cdf).pvalue > 1e-3
    assert stats.kstest(slow, "norm", (0.0, 0.2)).pvalue > 1e-3
    np.testing.assert_array_equal(np.sign(inputs[:, 0]), targets)
    assert abs(targets.mean()) < 4.5 / math.sqrt(len(targets))


@pytest.mark.parametrize("equal", [False, True])
def test_the_closed_form_is_what_the_iteration_gives(equal: bool) -> None:
    task = Toy(equal=equal, epsilon=0.05)
    first, second = moments(task.margin)
    covariance, correlation = np.diag([second, 0.05]), np.array([first, 0.0])
    weights = np.array(task.start)
    for step in range(1, 61):
        gradient = covariance @ weights - correlation
        weights = weights - STEP_SIZE * (np.linalg.solve(covariance, gradient) if equal else gradient)
        if step in (1, 7, 60):
            (found,) = weights_after(task, STEP_SIZE, [step]).numpy()
            np.testing.assert_allclose(found, weights, rtol=1e-10)
    np.testing.assert_allclose(np.linalg.solve(covariance, correlation), least_squares(0.5).numpy())


@pytest.mark.parametrize("angle", [0.3, math.pi / 4, 1.2])
def test_the_accuracy_is_the_share_of_the_arc(angle: float) -> None:
    draw = np.random.default_rng(0)
    from_boundary = draw.uniform(0.0, math.pi / 2 - angle, 200_000)
    directions = np.stack([np.sin(from_boundary), -np.cos(from_boundary)])
    for weights in ((1.0, 0.05), (1.0, 0.4), (0.2, 1.0), (1.0, 9.0)):
        right = float((np.array(weights) @ directions > 0.0).mean())
        found = float(accuracy_of(torch.tensor(weights, dtype=torch.float64), angle))
        assert found == pytest.approx(right, abs=4.5 * 0.5 / math.sqrt(200_000))


def run_toy(run_of: RunOf, epochs: int, **task: Any) -> list[tuple[int, float]]:
    config = Config.model_validate(
        {
            "task": {"name": "toy", **task},
            "model": {"name": "linear"},
            "optimizer": {"name": "sgd", "lr": STEP_SIZE},
            "train": {"batch": 0, "epochs": epochs, "dtype": "float64", "evaluate_every": 5},
        }
    )
    return run_of(grokking, config).history("valid/accuracy")


@pytest.mark.parametrize("equal", [False, True])
def test_a_run_is_the_closed_form(equal: bool, run_of: RunOf) -> None:
    history = run_toy(run_of, 300, equal=equal, start=(1.0, 4.0))
    steps = [step for step, _ in history]
    task = Toy(equal=equal, start=(1.0, 4.0))
    expected = accuracy_of(weights_after(task, STEP_SIZE, steps), task.angle)
    assert {0.0, 1.0} <= {round(value, 1) for _, value in history}
    np.testing.assert_allclose([value for _, value in history], expected, atol=1.0 / task.test_points)


@pytest.mark.parametrize("equal", [False, True])
def test_a_sample_is_near_its_population(equal: bool, run_of: RunOf) -> None:
    sampled = dict(run_toy(run_of, 400, equal=equal, samples=20_000))
    whole = dict(run_toy(run_of, 400, equal=equal))
    # the least-squares weights of a sample are off by about 1 / sqrt(n eps) = 0.02
    assert max(abs(sampled[step] - whole[step]) for step in whole) < 0.1


def test_the_equal_scheme_starts_where_gradient_descent_does() -> None:
    sections: dict[str, Any] = {"model": {"name": "linear"}, "train": {"batch": 0, "dtype": "float64"}}
    outputs = []
    for equal in (False, True):
        task = {"name": "toy", "samples": 50, "equal": equal}
        config = Config.model_validate({"task": task, **sections})
        found = dataset(config, 3, torch.device("cpu"))
        outputs.append([network(config, 3)(split.inputs) for split in found])
    for plain, turned in zip(*outputs, strict=True):
        torch.testing.assert_close(plain, turned)


def steps_to(accuracy: float, task: Toy) -> int:
    """The first step with that accuracy, by the closed form."""
    last = 200_000
    found = accuracy_of(weights_after(task, STEP_SIZE, range(last)), task.angle) >= accuracy
    assert bool(found[-1])
    return int(found.nonzero()[0])


def test_e4_the_slow_direction_takes_in_inverse_proportion_to_its_variance() -> None:
    epsilons = np.array([0.1, 0.01, 0.001])
    plain = [steps_to(0.95, Toy(epsilon=epsilon)) for epsilon in epsilons]
    slope, *_ = np.polyfit(np.log(1.0 / epsilons), np.log(plain), 1)
    assert slope == pytest.approx(1.0, abs=0.01)
    equal = [steps_to(0.95, Toy(epsilon=epsilon, equal=True)) for epsilon in epsilons]
    assert len(set(equal)) == 1
    assert equal[0] <= 40
    assert plain[1] / equal[1] >= 50


@pytest.mark.parametrize(("epsilon", "angle"), [(0.1, math.pi / 4), (0.01, math.pi / 4), (0.01, 1.2)])
def test_the_plateau_is_as_long_as_the_theory_says(epsilon: float, angle: float) -> None:
    task = Toy(epsilon=epsilon, angle=angle, start=(1.0, 1000.0))
    assert steps_to(1e-12, task) == pytest.approx(plateau_steps(task, STEP_SIZE), rel=0.02)
