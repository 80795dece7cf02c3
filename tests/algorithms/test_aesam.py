"""AE-SAM: its choice of steps against the paper written out, on gradients whose norms are prescribed."""

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.algorithms.sharpness import batches, network, sgd, train, weights
from torch import nn

from piste_algorithms.optimizers import AESAM


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def choices(squares: Sequence[float] | NDArray[np.float64], **options: Any) -> list[bool]:
    """Which steps had a second pass, for gradients of these squared norms."""
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AESAM(torch.optim.SGD([parameter], lr=0.0), **{"total_steps": len(squares), **options})
    chosen = []
    for square in squares:
        slope = torch.tensor([0.6, -0.8], dtype=torch.float64) * math.sqrt(square)

        def closure(slope: torch.Tensor = slope) -> None:
            optimizer.zero_grad()
            (slope @ parameter).backward()  # type: ignore[no-untyped-call]

        before = optimizer.sam_steps
        optimizer.step(closure)
        chosen.append(optimizer.sam_steps > before)
    return chosen


@pytest.mark.parametrize(
    "options", [{}, {"delta": 0.5}, {"lambda_1": -2.0, "lambda_2": 0.5}, {"total_steps": 100}]
)
def test_the_choice_is_the_paper_s(options: dict[str, Any]) -> None:
    squares = np.random.default_rng(0).gamma(3.0, 1.0, 400)
    delta, total = options.get("delta", 0.9), options.get("total_steps", 400)
    lambda_1, lambda_2 = options.get("lambda_1", -1.0), options.get("lambda_2", 1.0)
    mu, sigma2 = squares[0], 0.0
    expected = [True]
    for t in range(1, 400):
        mu = delta * mu + (1 - delta) * squares[t]
        sigma2 = delta * sigma2 + (1 - delta) * (squares[t] - mu) ** 2
        share = min(t / total, 1)
        c = share * lambda_1 + (1 - share) * lambda_2
        expected.append(bool(squares[t] >= mu + c * np.sqrt(sigma2)))
    assert choices(squares, **options) == expected


def test_half_of_the_steps_and_more_of_them_late() -> None:
    """Normal squared norms and lambda_1 = -lambda_2 = -1: about half; by the end, most of them."""
    chosen = np.array(choices(np.random.default_rng(1).normal(100.0, 5.0, 2000)))
    assert 0.45 <= chosen.mean() <= 0.55
    assert chosen[:500].mean() < 0.35
    assert chosen[-500:].mean() > 0.65


def test_the_threshold_stays_after_the_last_step() -> None:
    squares = np.random.default_rng(2).normal(100.0, 5.0, 600)
    chosen = choices(squares, total_steps=10)
    assert np.mean(chosen[100:]) == pytest.approx(0.84, abs=0.06)  # the normal distribution above -1


def test_a_gradient_that_is_not_finite_does_not_enter_the_averages() -> None:
    squares = list(np.random.default_rng(3).gamma(3.0, 1.0, 60))
    broken = [*squares[:30], math.inf, *squares[30:]]
    parameter_free = {"total_steps": 10**6}  # the same threshold at shifted steps
    expected = choices(squares, **parameter_free)
    assert choices(broken, **parameter_free) == [*expected[:30], False, *expected[30:]]


def test_resume_is_bit_for_bit() -> None:
    data = batches(40)
    model, other = network(), network(seed=1)
    optimizer = AESAM(sgd(model), total_steps=40)
    train(model, optimizer, data[:13])
    stored = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    other.load_state_dict(loaded["model"])
    resumed = AESAM(sgd(other), total_steps=40)
    resumed.load_state_dict(loaded["optimizer"])
    chosen = train(model, optimizer, data[13:])
    assert train(other, resumed, data[13:]) == chosen
    assert 0 < sum(chosen) < len(chosen)
    assert torch.equal(weights(model), weights(other))
    assert resumed.sam_fraction == optimizer.sam_fraction


def test_total_steps_is_required() -> None:
    build: Any = AESAM
    with pytest.raises(TypeError, match="total_steps"):
        build(sgd(network()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be an integer >= 1, got 0"),
        ({"total_steps": 1.5}, "total_steps must be an integer >= 1, got 1.5"),
        ({"delta": 1.0}, r"delta must be a number in \[0, 1\), got 1.0"),
        ({"lambda_1": -math.inf}, "lambda_1 must be a number .* got -inf"),
        ({"lambda_2": math.nan}, "lambda_2 must be a number .* got nan"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AESAM(sgd(network()), **{"total_steps": 10, **arguments})
