"""Fisher information and its steps: against second derivatives, in any coordinates, capped, rolled back."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.algorithms.shifted_task import WIDTH, Task
from torch import Tensor
from torch.autograd.functional import hessian

from piste_algorithms.adaptation import FisherPrompt, GradientPrompt
from piste_algorithms.adaptation.fisher import fisher_factor, solve_factored


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained() -> Task:
    return Task(0, shift=8.0)


@pytest.fixture
def task(trained: Task) -> Task:
    trained.generator.manual_seed(1)  # the same draws, whatever ran before
    return trained


def fisher(task: Task, x: Tensor, **options: Any) -> Tensor:
    prompt = 0.1 * torch.ones(WIDTH, dtype=torch.float64)
    rows = fisher_factor(task.model, prompt, x, **options)
    return rows.T @ rows


def test_the_fisher_is_the_second_derivative_of_the_divergence(task: Task) -> None:
    x = task.draw(20)[0]
    prompt = 0.1 * torch.ones(WIDTH, dtype=torch.float64)
    source = task.model(x, prompt).log_softmax(-1)

    def divergence(theta: Tensor) -> Tensor:
        after: Tensor = task.model(x, theta).log_softmax(-1)
        distance: Tensor = (source.exp() * (source - after)).sum(-1).mean()
        return distance

    second = hessian(divergence, prompt)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(fisher(task, x), second, rtol=1e-9, atol=1e-12)


def test_drawn_labels_are_unbiased(task: Task) -> None:
    x = task.draw(30)[0]
    exact = fisher(task, x)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([fisher(task, x, draws=4, generator=generator) for _ in range(300)])
    error = draws.mean(0) - exact
    deviation = draws.std(0) / 300**0.5
    # 1,024 entries, half of them equal: 7 standard errors are exceeded by chance less than once in a million.
    assert float((error.abs() / (deviation + 1e-12)).max()) < 7.0
    assert float(error.norm() / exact.norm()) < 0.1


def test_chunks_make_no_difference(task: Task) -> None:
    x = task.draw(10)[0]
    torch.testing.assert_close(fisher(task, x, chunk=3), fisher(task, x), rtol=1e-12, atol=1e-14)


def test_solving_leaves_directions_without_information_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    rows[:, 3] = 0.0  # no information at all
    rows[:, 5] = rows[:, 4]  # none about the difference
    vector = rows.T @ torch.randn(40, generator=generator, dtype=torch.float64)
    found = solve_factored(rows, vector, np.finfo(np.float64).eps)
    expected = np.linalg.lstsq((rows.T @ rows).numpy(), vector.numpy(), rcond=1e-12)[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose((rows @ found).numpy(), rows.numpy() @ expected, rtol=1e-6, atol=1e-8)
    assert found[3] == 0.0


def coordinates(seed: int) -> Tensor:
    """A linear map of condition 10^4."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    mixed: Tensor = left @ torch.diag(torch.logspace(-2, 2, WIDTH, dtype=torch.float64)) @ right
    return mixed


def difference(
    task: Task, seed: int, build: Callable[[Callable[..., Tensor], Tensor], Any]
) -> tuple[float, float]:
    """How far apart 8 steps in two coordinate systems end: relative, of prompts and of predictions."""
    matrix = coordinates(seed)

    def mapped(x: Tensor, prompt: Tensor) -> Tensor:
        logits: Tensor = task.model(x, matrix @ prompt)
        return logits

    start = torch.zeros(WIDTH, dtype=torch.float64)
    sides = [build(task.model, start), build(mapped, start)]
    source = task.draw(300)[0]
    batches = [task.draw(64, shifted=True)[0] for _ in range(8)]
    for side in sides:
        side.fit_source(source)
        for batch in batches:
            assert side.adapt(batch).accepted
    prompt, other = sides[0].prompt, matrix @ sides[1].prompt
    x = task.draw(200, shifted=True)[0]
    probabilities = [side.predict(x).softmax(-1) for side in sides]
    return (
        float((prompt - other).norm() / prompt.norm()),
        float((probabilities[0] - probabilities[1]).abs().max()),
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_steps_are_the_same_in_any_coordinates(task: Task, seed: int) -> None:
    moved, predicted = difference(task, seed, FisherPrompt)
    assert moved <= 1e-3
    assert predicted <= 1e-3
    moved, _ = difference(task, seed, lambda model, prompt: GradientPrompt(model, prompt, 0.03, "sgd"))
    assert moved > 1.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_shift_is_undone_without_tuning(seed: int) -> None:
    task = Task(seed, shift=8.0)
    adapter = FisherPrompt(task.model, torch.zeros(WIDTH, dtype=torch.float64))
    adapter.fit_source(task.draw(500)[0])
    clean, shifted = task.draw(2000), task.draw(2000, shifted=True)
    source = task.accuracy(task.network(clean[0]), clean[1])
    before = task.accuracy(adapter.predict(shifted[0]), shifted[1])
    for _ in range(25):
        info = adapter.adapt(task.draw(64, shifted=True)[0])
        assert info.accepted
        assert 0 < info.kl <= 0.05
        assert info.loss_after <= 1.1 * info.loss
    after = task.accuracy(adapter.predict(shifted[0]), shifted[1])
    assert after >= source - 0.01
    assert after >= before + 0.025


@pytest.mark.parametrize("objective", ["information_maximization", "entropy", "entropy_matching"])
@pytest.mark.parametrize("curvature", ["full", "diagonal"])
def test_the_measured_divergence_is_capped(task: Task, objective: str, curvature: str) -> None:
    adapter = FisherPrompt(
        task.model,
        torch.zeros(WIDTH, dtype=torch.float64),
        step_size=1e6,
        max_kl=0.01,
        objective=objective,
        curvature=curvature,
    )
    adapter.fit_source(task.draw(300)[0])
    for _ in range(6):
        batch = task.draw(64, shifted=True)[0]
        before = adapter.predict(batch).log_softmax(-1)
        info = adapter.adapt(batch)
        after = adapter.predict(batch).log_softmax(-1)
        measured = float(torch.nn.functional.kl_div(after, before, reduction="batchmean", log_target=True))
        assert info.accepted
        assert measured == pytest.approx(info.kl, rel=1e-9)
        assert 0 < measured <= 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_classes_draw_labels_and_continue_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(10, 40, generator=generator, dtype=dtype)

    def model(x: Tensor, prompt: Tensor) -> Tensor:
        return (x + prompt) @ weights

    def build() -> FisherPrompt:
        return FisherPrompt(model, torch.zeros(10, dtype=dtype), seed=3)

    batches = torch.randn(6, 20, 10, generator=generator, dtype=dtype)
    whole, before = build(), build()
    for adapter in (whole, before):
        adapter.fit_source(batches[0])
    for batch in batches:
        whole.adapt(batch)
    for batch in batches[:3]:
        before.adapt(batch)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = build()
    after.load_state_dict(torch.load(file))
    for batch in batches[3:]:
        after.adapt(batch)
    assert torch.equal(after.prompt, whole.prompt)
    assert not torch.equal(before.prompt, whole.prompt)


# What goes wrong


def test_a_step_that_always_harms_is_rolled_back(task: Task) -> None:
    class Contrary:
        """Uniform on the second look at the same prompt's neighbourhood, whatever the step."""

        def __call__(self, x: Tensor, prompt: Tensor) -> Tensor:
            logits: Tensor = task.model(x, prompt)
            moved = (prompt.detach() != 0).any()
            return torch.where(moved, torch.zeros_like(logits), logits)

    adapter = FisherPrompt(Contrary(), torch.zeros(WIDTH, dtype=torch.float64))
    adapter.fit_source(task.draw(300)[0])
    batch = task.draw(64, shifted=True)[0]
    expected = adapter.predict(batch)
    info = adapter.adapt(batch)
    assert not info.accepted
    assert (info.kl, info.step_size, info.loss_after) == (0.0, 0.0, info.loss)
    assert torch.equal(adapter.predict(batch), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_no_numbers_change_nothing(task: Task, value: float) -> None:
    adapter = FisherPrompt(task.model, torch.zeros(WIDTH, dtype=torch.float64))
    adapter.fit_source(task.draw(300)[0])
    clean = task.draw(64, shifted=True)[0]
    adapter.adapt(clean)
    before = adapter.state_dict()
    dirty = clean.clone()
    dirty[5, 3] = value
    network_of_inf_is_finite = bool(torch.isfinite(task.network(dirty)).all())
    info = adapter.adapt(dirty)
    if network_of_inf_is_finite:  # tanh has an end: the input is like any other
        assert info.accepted
    else:
        assert not info.accepted
        assert math.isnan(info.loss)
        for name in ("prompt", "average"):
            assert torch.equal(adapter.state_dict()[name], before[name])
    assert adapter.adapt(clean).accepted


def test_nothing_to_gain_is_no_step(task: Task) -> None:
    adapter = FisherPrompt(lambda x, prompt: x[:, :4] + 0 * prompt.sum(), torch.zeros(3, dtype=torch.float64))
    adapter.fit_source(task.draw(30)[0])
    info = adapter.adapt(task.draw(30)[0])
    assert not info.accepted
    assert torch.equal(adapter.prompt, torch.zeros(3, dtype=torch.float64))


def test_a_source_without_finite_derivatives_is_refused() -> None:
    adapter = FisherPrompt(lambda x, prompt: (x + prompt).abs().sqrt(), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="finite derivatives"):
        adapter.fit_source(torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64))


def test_reset_gives_the_first_prompt_and_the_first_step(task: Task) -> None:
    adapter = FisherPrompt(task.model, torch.zeros(WIDTH, dtype=torch.float64))
    adapter.fit_source(task.draw(300)[0])
    batches = [task.draw(64, shifted=True)[0] for _ in range(3)]
    first = [adapter.adapt(batch) for batch in batches]
    moved = adapter.prompt.clone()
    adapter.reset()
    assert torch.equal(adapter.prompt, torch.zeros(WIDTH, dtype=torch.float64))
    assert [adapter.adapt(batch) for batch in batches] == first
    assert torch.equal(adapter.prompt, moved)


def test_bad_arguments_are_named(task: Task) -> None:
    prompt = torch.zeros(WIDTH, dtype=torch.float64)
    for options, message in (
        ({"step_size": 0.0}, "step_size must be"),
        ({"damping": 0.0}, "damping must be"),
        ({"max_kl": math.nan}, "max_kl must be"),
        ({"curvature": "block"}, "curvature must be"),
        ({"damped_by": "block"}, "damped_by must be one of 'predicted', 'even', 'identity'"),
        ({"draws": 0}, "draws must be"),
        ({"objective": "accuracy"}, "objective must be one of 'information_maximization'"),
    ):
        with pytest.raises(ValueError, match=message):
            FisherPrompt(task.model, prompt, **options)
    with pytest.raises(ValueError, match=r"at most 2048 entries .*, got 5000"):
        FisherPrompt(task.model, torch.zeros(5000))
    with pytest.raises(ValueError, match="prompt must be a floating-point tensor"):
        FisherPrompt(task.model, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="prompt must be float32 or float64"):
        FisherPrompt(task.model, torch.zeros(32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="prompt must be finite"):
        FisherPrompt(task.model, torch.tensor([math.nan]))
    adapter = FisherPrompt(task.model, prompt)
    with pytest.raises(RuntimeError, match="call fit_source"):
        adapter.adapt(task.draw(4)[0])
    with pytest.raises(ValueError, match="at least one input"):
        adapter.fit_source(torch.zeros(0, WIDTH))
    with pytest.raises(ValueError, match="x must give finite logits"):
        adapter.fit_source(torch.full((3, WIDTH), math.nan, dtype=torch.float64))
