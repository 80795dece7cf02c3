"""Grokfast: against the filter of `pytorch_optimizer`, against its transfer function, and bad input."""

import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytorch_optimizer.optimizer.grokfast import gradfilter_ema
from torch import Tensor, nn

from piste_algorithms.optimizers import GrokfastEMA


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def backward(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs, targets = (torch.randn(16, n, dtype=torch.float64, generator=generator) for n in (5, 3))
    model.zero_grad()
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


Make = Callable[[nn.Module], torch.optim.Optimizer]
BASES: dict[str, Make] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
@pytest.mark.parametrize(("alpha", "lamb"), [(0.98, 2.0), (0.8, 0.1), (0.0, 1.0)])
def test_fifty_steps_match_an_independent_filter(make: Make, alpha: float, lamb: float) -> None:
    ours, theirs = build(), build()
    optimizer, base = GrokfastEMA(make(ours), alpha, lamb), make(theirs)
    averages: dict[str, Tensor] | None = None
    for step in range(50):
        backward(ours, step)
        optimizer.step()
        backward(theirs, step)
        averages = gradfilter_ema(theirs, averages, alpha, lamb)
        base.step()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frequency", [0.0, 0.05, 0.5, math.pi])
def test_slow_parts_are_amplified_by_the_filters_transfer_function(frequency: float) -> None:
    """H(w) = 1 + lamb (1 - alpha) / (1 - alpha exp(-i w)): 1 + lamb at 0, about 1 at pi."""
    alpha, lamb, steps = 0.9, 2.0, 400
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = GrokfastEMA(torch.optim.SGD([parameter], lr=1.0), alpha, lamb)
    moves, waves = [], []
    for step in range(steps):
        before = parameter.item()
        parameter.grad = torch.full((1,), math.cos(frequency * step), dtype=torch.float64)
        optimizer.step()
        moves.append(before - parameter.item())
        phase = torch.tensor(-1j * frequency, dtype=torch.complex128)
        transfer = 1 + lamb * (1 - alpha) / (1 - alpha * torch.exp(phase))
        waves.append(float((transfer * torch.exp(-phase * step)).real))
    assert moves[-100:] == pytest.approx(waves[-100:], abs=1e-9)  # 0.9^300 of the start is left


def test_the_average_starts_at_the_first_gradient_of_each_parameter() -> None:
    """Also of one whose first gradient comes later."""
    early, late = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = GrokfastEMA(torch.optim.SGD([early, late], lr=1.0), alpha=0.75, lamb=2.0)
    early.grad = torch.ones(2)
    optimizer.step()
    assert early.tolist() == [-3.0, -3.0]
    assert not optimizer.state[late]
    early.grad, late.grad = torch.zeros(2), torch.full((2,), 2.0)
    optimizer.step()
    assert early.tolist() == [-4.5, -4.5]  # h = 0.75
    assert late.tolist() == [-6.0, -6.0]


def test_gradients_are_the_callers_again() -> None:
    model = build()
    optimizer = GrokfastEMA(torch.optim.SGD(model.parameters(), lr=0.1))
    backward(model, 0)
    held = [
        (parameter.grad, parameter.grad.clone())
        for parameter in model.parameters()
        if parameter.grad is not None
    ]
    optimizer.step()
    for parameter, (gradient, value) in zip(model.parameters(), held, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)


def test_nothing_to_do_is_no_error() -> None:
    model = build()
    before = copy.deepcopy(model)
    GrokfastEMA(torch.optim.SGD(model.parameters(), lr=0.1)).step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_resume_is_bit_for_bit(make: Make) -> None:
    model = build()
    optimizer = GrokfastEMA(make(model))

    def closure() -> Tensor:
        return backward(model, 3)

    for _ in range(4):
        optimizer.step(closure)  # type: ignore[arg-type]
    other = copy.deepcopy(model)
    resumed = GrokfastEMA(make(other))
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    for step in range(4):
        for net, stepper in ((model, optimizer), (other, resumed)):
            backward(net, step)
            stepper.step()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = GrokfastEMA(torch.optim.SGD(embedding.parameters(), lr=0.1))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="GrokfastEMA does not support sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.0}, r"alpha must be a number in \[0, 1\), got 1.0"),
        ({"alpha": -0.1}, "alpha must be"),
        ({"lamb": -1.0}, r"lamb must be a number in \[0, inf\), got -1.0"),
        ({"lamb": math.nan}, "lamb must be"),
        ({"lamb": math.inf}, "lamb must be"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrokfastEMA(torch.optim.SGD(build().parameters(), lr=0.1), **arguments)


def test_the_base_is_checked() -> None:
    with pytest.raises(ValueError, match="base must be a built torch optimizer"):
        GrokfastEMA(torch.optim.SGD)  # type: ignore[arg-type]
