"""REG: the operator against a paper-like reference, its invariances, the optimizer, acceptance checks."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.algorithms.small_language_model import (
    SmallLanguageModel,
    build_model,
    markov_chain,
    train,
)
from torch import Tensor, nn

import piste_algorithms.optimizers.reg as reg_module
from piste_algorithms.optimizers import REG, racs

Array = NDArray[np.float64]
derandomised = settings(derandomize=True, deadline=None, max_examples=40)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def oracle(
    matrix: Array, n_sweeps: int = 1, order: str = "row_col", p: float = 2, rms: float | None = 0.2
) -> Array:
    """RACS as it is written: divide rows, divide columns, rescale."""
    u = matrix.copy()
    for _ in range(n_sweeps):
        for side in order.split("_"):
            axis = 1 if side == "row" else 0
            norms = (np.abs(u) ** p).sum(axis=axis, keepdims=True) ** (1 / p)
            u /= np.where(norms == 0, 1.0, norms)
    frobenius = np.sqrt((u**2).sum())
    return u if rms is None or frobenius == 0 else u * rms * math.sqrt(u.size) / frobenius


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def ensemble() -> list[Tensor]:
    """100 float64 matrices: all kinds of shapes, some with zero rows and columns."""
    matrices = []
    for index in range(100):
        generator = torch.Generator().manual_seed(index)
        m, n = (int(size) for size in torch.randint(1, 40, (2,), generator=generator))
        m, n = (1 if index % 10 == 0 else m), (1 if index % 10 == 1 else n)
        matrix = torch.randn(m, n, dtype=torch.float64, generator=generator)
        if index % 3 == 0 and m > 1:
            matrix[m // 2] = 0
        if index % 4 == 0 and n > 1:
            matrix[:, n // 2] = 0
        matrices.append(matrix)
    return matrices


def relative_spread(norms: Tensor) -> float:
    nonzero = norms[norms > 0]
    return (nonzero.max() / nonzero.min() - 1).item()


# The operator


@pytest.mark.parametrize("matrix", ensemble(), ids=lambda matrix: "x".join(map(str, matrix.shape)))
def test_columns_are_equal_and_the_rms_is_exact(matrix: Tensor) -> None:
    result = racs(matrix)
    assert relative_spread(torch.linalg.vector_norm(result, dim=0)) < 1e-12
    assert result.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-12)
    assert torch.equal(result == 0, matrix == 0)
    np.testing.assert_allclose(result.numpy(), oracle(matrix.numpy()), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("order", ["row_col", "col_row"])
@pytest.mark.parametrize("n_sweeps", [1, 2, 5])
@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("rms", [None, 1.0])
def test_every_option_matches_the_reference(order: str, n_sweeps: int, p: float, rms: float | None) -> None:
    matrix = normal(9, 14)
    matrix[3] = 0
    matrix[:, 5] = 0
    expected = oracle(matrix.numpy(), n_sweeps, order, p, rms)
    np.testing.assert_allclose(racs(matrix, n_sweeps, order, p, rms).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_keeps_the_dtype_and_the_input(dtype: torch.dtype) -> None:
    matrix = normal(8, 16).to(dtype)
    before = matrix.clone()
    result = racs(matrix)
    assert result.dtype == dtype
    assert torch.equal(matrix, before)
    expected = oracle(matrix.double().numpy())
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_extreme_scales(dtype: torch.dtype, scale: float) -> None:
    matrix = normal(12, 7).to(dtype)
    torch.testing.assert_close(racs(matrix * scale), racs(matrix), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rms", [0.2, None])
@pytest.mark.parametrize("n_sweeps", [1, 20])
def test_zero_gives_zero(rms: float | None, n_sweeps: int) -> None:
    assert torch.equal(racs(torch.zeros(3, 4), n_sweeps, rms=rms), torch.zeros(3, 4))


def test_noise_rows_are_not_blown_up() -> None:
    matrix = normal(4, 6)
    matrix[0] *= 1e-12
    bounded = torch.linalg.vector_norm(racs(matrix, eps=1e-8)[0])
    assert 0 < bounded.item() < 1e-3
    assert torch.linalg.vector_norm(racs(matrix, eps=0.0)[0]).item() > 0.1


def test_a_non_finite_entry_stays_in_its_matrix() -> None:
    batch = normal(3, 5, 4)
    spoiled = batch.clone()
    spoiled[1, 2, 3] = float("nan")
    result = racs(spoiled)
    assert bool(result[1].isnan().all())
    assert torch.equal(result[0], racs(batch)[0])
    assert torch.equal(result[2], racs(batch)[2])


def test_a_batch_equals_one_by_one() -> None:
    batch = normal(2, 3, 17, 11, dtype=torch.float32)
    together = racs(batch)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], racs(batch[i, j]), rtol=1e-6, atol=1e-7)
    assert racs(torch.empty(0, 3, 4)).shape == (0, 3, 4)


sizes = st.integers(1, 12)
seeds = st.integers(0, 2**31)


@derandomised
@given(m=sizes, n=sizes, seed=seeds, scale=st.floats(1e-25, 1e25))
def test_scale_does_not_matter(m: int, n: int, seed: int, scale: float) -> None:
    matrix = normal(m, n, seed=seed)
    torch.testing.assert_close(racs(scale * matrix), racs(matrix), rtol=1e-11, atol=1e-13)


@derandomised
@given(m=sizes, n=sizes, seed=seeds)
def test_permutations_and_signs_commute(m: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(m, generator=generator), torch.randperm(n, generator=generator)
    signs = torch.randint(0, 2, (m, 1), generator=generator) * 2 - 1
    matrix = normal(m, n, seed=seed)
    expected = (signs * racs(matrix))[rows][:, columns]
    torch.testing.assert_close(racs((signs * matrix)[rows][:, columns]), expected, rtol=1e-11, atol=1e-13)


@derandomised
@given(m=sizes, n=sizes, seed=seeds)
def test_transposing_swaps_the_order(m: int, n: int, seed: int) -> None:
    matrix = normal(m, n, seed=seed)
    torch.testing.assert_close(racs(matrix.T, order="col_row").T, racs(matrix), rtol=1e-11, atol=1e-13)


@derandomised
@given(m=sizes, n=sizes, seed=seeds)
def test_row_scalings_do_not_matter(m: int, n: int, seed: int) -> None:
    matrix = normal(m, n, seed=seed)
    scaling = torch.exp(normal(m, 1, seed=seed + 1))
    torch.testing.assert_close(racs(scaling * matrix), racs(matrix), rtol=1e-11, atol=1e-13)


def test_column_scalings_matter_after_one_sweep_and_not_after_many() -> None:
    matrix, scaling = normal(10, 12), torch.exp(normal(1, 12, seed=1))
    assert not torch.allclose(racs(matrix * scaling), racs(matrix), rtol=1e-2)
    torch.testing.assert_close(racs(matrix * scaling, 50), racs(matrix, 50), rtol=1e-6, atol=1e-7)


def test_conditioning() -> None:
    """B2: a badly scaled ensemble is within twice the condition number of its core after one sweep."""
    core, raw, scaled = [], [], []
    for seed in range(25):
        inner = normal(64, 96, seed=seed)
        rows = torch.exp(1.5 * normal(64, 1, seed=seed + 100))
        columns = torch.exp(1.5 * normal(96, seed=seed + 200))
        outer = rows * inner * columns
        core.append(torch.linalg.cond(inner))
        raw.append(torch.linalg.cond(outer))
        scaled.append(torch.linalg.cond(racs(outer)))
    median_core, median_raw, median_scaled = (torch.stack(x).median().item() for x in (core, raw, scaled))
    assert median_scaled <= 2 * median_core
    assert median_scaled <= median_raw / 100


def test_many_sweeps_balance_both_sides() -> None:
    result = racs(normal(64, 96), n_sweeps=20)
    assert relative_spread(torch.linalg.vector_norm(result, dim=0)) < 1e-6
    assert relative_spread(torch.linalg.vector_norm(result, dim=1)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrix": torch.zeros(3)}, r"matrix must be .*\(3,\)"),
        ({"matrix": torch.zeros(3, 3, dtype=torch.int64)}, "matrix must be .*int64"),
        ({"n_sweeps": 0}, "n_sweeps must be an integer >= 1, got 0"),
        ({"n_sweeps": 1.5}, "n_sweeps must be an integer >= 1, got 1.5"),
        ({"order": "rows"}, "order must be one of 'row_col', 'col_row', got 'rows'"),
        ({"p": 0.5}, r"p must be a number in \[1, inf\), got 0.5"),
        ({"p": math.inf}, "p must be .* got inf"),
        ({"rms": 0.0}, r"rms must be a number in \(0, inf\), got 0.0"),
        ({"eps": -1e-8}, r"eps must be a number in \[0, 1\), got -1e-08"),
        ({"eps": math.nan}, "eps must be .* got nan"),
    ],
)
def test_operator_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        racs(**{"matrix": torch.ones(2, 2), **arguments})


# The optimizer


def reference_run(
    weights: list[Array], gradients: Callable[[int, int], Array], steps: int, nesterov: bool = True
) -> list[Array]:
    """REG in float64 numpy, one matrix after the other: lr 0.01, momentum 0.9, weight decay 0.1."""
    weights = [weight.copy() for weight in weights]
    momenta = [np.zeros_like(weight) for weight in weights]
    for step in range(steps):
        for index, weight in enumerate(weights):
            gradient = gradients(step, index)
            momenta[index] = 0.9 * momenta[index] + 0.1 * gradient
            u = 0.1 * gradient + 0.9 * momenta[index] if nesterov else momenta[index]
            weights[index] = (1 - 0.01 * 0.1) * weight - 0.01 * oracle(u)
    return weights


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fifty_steps_match_the_reference(nesterov: bool, dtype: torch.dtype) -> None:
    """Several shapes, several matrices of a shape, batches that do not divide evenly."""
    shapes = [(9, 5), (6, 6), (9, 5), (1, 4), (9, 5), (4, 1)]
    starts = [normal(*shape, seed=index) for index, shape in enumerate(shapes)]

    def gradient(step: int, index: int) -> Tensor:
        return normal(*shapes[index], seed=1000 * step + index)

    expected = reference_run(
        [start.numpy() for start in starts], lambda step, index: gradient(step, index).numpy(), 50, nesterov
    )
    parameters = [nn.Parameter(start.to(dtype)) for start in starts]
    optimizer = REG(parameters, lr=0.01, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    for step in range(50):
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient(step, index).to(dtype)
        optimizer.step()
    for parameter, weight in zip(parameters, expected, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
        np.testing.assert_allclose(
            parameter.detach().double().numpy(), weight, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("entries", [1, 100, 2**18])
def test_batching_equals_one_by_one(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(reg_module, "_BATCH_ENTRIES_CPU", entries)
    together = [nn.Parameter(normal(8, 6, seed=index)) for index in range(5)]
    alone = [nn.Parameter(parameter.detach().clone()) for parameter in together]
    batched = REG(together, lr=0.01)
    single = [REG([parameter], lr=0.01) for parameter in alone]
    for step in range(5):
        for index in range(5):
            together[index].grad = normal(8, 6, seed=100 * step + index)
            alone[index].grad = normal(8, 6, seed=100 * step + index)
        batched.step()
        for optimizer in single:
            optimizer.step()
    for left, right in zip(together, alone, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-14)


def test_convolutions_are_flattened_whatever_their_layout() -> None:
    start, gradient = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    flat, flat_gradient = start.view(4, 12).numpy(), gradient.view(4, 12).numpy()
    expected = reference_run([flat], lambda step, index: flat_gradient, 1)[0]
    for layout in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(start.clone(memory_format=layout))
        parameter.grad = gradient.to(memory_format=layout)
        REG([parameter], lr=0.01, momentum=0.9).step()
        np.testing.assert_allclose(parameter.detach().reshape(4, 12).numpy(), expected, rtol=1e-12)


def test_bfloat16_is_computed_in_float32() -> None:
    start, gradient = normal(16, 32, dtype=torch.bfloat16), normal(16, 32, seed=1, dtype=torch.bfloat16)
    half, single = nn.Parameter(start.clone()), nn.Parameter(start.float())
    half.grad, single.grad = gradient.clone(), gradient.float()
    REG([half], lr=0.1, momentum=0.0).step()
    REG([single], lr=0.1, momentum=0.0).step()
    torch.testing.assert_close(half.detach(), single.detach().bfloat16(), rtol=0, atol=0)


def test_update_has_the_declared_size_and_no_momentum_means_no_update() -> None:
    moving, still = nn.Parameter(normal(6, 9)), nn.Parameter(normal(6, 9, seed=1))
    before = moving.detach().clone(), still.detach().clone()
    moving.grad, still.grad = normal(6, 9, seed=2), torch.zeros(6, 9, dtype=torch.float64)
    REG([moving, still], lr=0.5, weight_decay=0.0, rms=0.3).step()
    assert (moving.detach() - before[0]).square().mean().sqrt().item() == pytest.approx(0.15, rel=1e-12)
    assert torch.equal(still, before[1])


def test_state_is_one_momentum_a_parameter() -> None:
    parameters = [nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(3, 5).bfloat16())]
    optimizer = REG(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert held == sum(parameter.nbytes for parameter in parameters)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_groups_without_reg_are_adamw_bit_for_bit(weight_decay: float) -> None:
    """B7, while a group with REG is stepped beside them."""
    shapes = [(7, 5), (5,), (), (4, 3, 2, 2)]
    ours = [nn.Parameter(normal(*shape, seed=i, dtype=torch.float32)) for i, shape in enumerate(shapes)]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    matrix = nn.Parameter(torch.ones(3, 3))
    groups: list[dict[str, Any]] = [{"params": [matrix]}, {"params": ours, "use_reg": False}]
    optimizer = REG(groups, lr=3e-3, weight_decay=weight_decay)
    adamw = torch.optim.AdamW(theirs, lr=3e-3, betas=(0.9, 0.95), weight_decay=weight_decay)
    for step in range(30):
        matrix.grad = torch.ones(3, 3)
        for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            left.grad = normal(*shapes[index], seed=100 * step + index, dtype=torch.float32)
            right.grad = left.grad.clone()
        optimizer.step()
        adamw.step()
        for left, right in zip(ours, theirs, strict=True):
            assert torch.equal(left, right)


def test_resume_with_both_kinds_of_groups_is_bit_for_bit() -> None:
    def build() -> tuple[SmallLanguageModel, REG]:
        model = build_model(0)
        return model, REG(REG.default_param_groups(model), lr=1e-2)

    chain = markov_chain(torch.Generator().manual_seed(0))
    (model, optimizer), (other, resumed) = build(), build()
    train(model, optimizer, chain, steps=4, seed=0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, chain, steps=4, seed=1)
    train(other, resumed, chain, steps=4, seed=1)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_gain_in_a_reg_group_is_named() -> None:
    model = nn.LayerNorm(4)
    with pytest.raises(ValueError, match=r"two or more dimensions, but parameter weight is \(4,\)"):
        REG(model.named_parameters())
    with pytest.raises(ValueError, match="parameter number 1 of the group"):
        REG([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))])
    optimizer = REG([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="two or more dimensions"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("use_reg", [True, False])
def test_sparse_gradients_are_refused(use_reg: bool) -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = REG([{"params": list(embedding.parameters()), "use_reg": use_reg}])
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="REG does not support sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, r"lr must be a number in \[0, inf\), got -1.0"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"n_sweeps": 0}, "n_sweeps must be"),
        ({"order": "col"}, "order must be"),
        ({"p": 0}, "p must be"),
        ({"rms": -1}, "rms must be"),
        ({"eps": 1.0}, "eps must be"),
    ],
)
def test_optimizer_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REG([nn.Parameter(torch.ones(2, 2))], **arguments)


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 1.0), 0.9])
def test_adamw_betas_are_checked(betas: Any) -> None:
    with pytest.raises(ValueError, match="adamw_betas"):
        REG([{"params": [nn.Parameter(torch.ones(2))], "use_reg": False}], adamw_betas=betas)
