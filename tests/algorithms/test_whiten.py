"""Whitening: against polar factors and pseudo-inverses, its invariances, and hard gradients."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _zeropower_via_newtonschulz

from piste_algorithms.optimizers import whiten
from piste_algorithms.optimizers.egd import METHODS

EXACT = ("eigh", "svd", "rsvd")
derandomised = settings(derandomize=True, deadline=None, max_examples=40)
every_method = pytest.mark.parametrize("method", METHODS)
every_exact_method = pytest.mark.parametrize("method", EXACT)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    q: Tensor = torch.linalg.qr(normal(rows, columns, seed=seed)).Q
    return q


def with_spectrum(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix `(m, n)` with the given singular values, the rest of them 0."""
    left, right = orthonormal(m, len(values), seed), orthonormal(n, len(values), seed + 10**6)
    return (left * values) @ right.mT


def polar(matrix: Tensor) -> Tensor:
    return torch.from_numpy(scipy.linalg.polar(matrix.double().numpy())[0])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def full_rank_ensemble() -> list[Tensor]:
    """50 float64 matrices, wide, tall, square and of one row or column, with condition numbers up to 1e3."""
    matrices = []
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        m, n = (int(size) for size in torch.randint(1, 60, (2,), generator=generator))
        m, n = (1 if seed % 10 == 0 else m), (1 if seed % 10 == 1 else n)
        exponents = -3 * torch.rand(min(m, n), dtype=torch.float64, generator=generator)
        matrices.append(with_spectrum(m, n, 10.0**exponents, seed))
    return matrices


# Against independent references


@every_exact_method
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)]
)
def test_is_the_polar_factor(method: str, dtype: torch.dtype, tolerance: float) -> None:
    """E1. Only `eigh` computes float32 in float64; the others meet eps times the condition number."""
    single = dtype == torch.float32 and method != "eigh"
    for exact in full_rank_ensemble():
        matrix = exact.to(dtype)
        before = matrix.clone()
        found = whiten(matrix, method)
        assert found.dtype == dtype
        assert torch.equal(matrix, before)
        if dtype == torch.bfloat16 and method != "eigh":
            continue  # rounding to 8 bits makes the condition number what it likes
        assert error(found, polar(matrix)) < (1e-3 if single else tolerance)
        values = torch.linalg.svdvals(found.double())
        assert float((values - 1).abs().max()) < (1e-3 if single else max(1e-4, 10 * tolerance))


@every_exact_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", ["wide", "tall"])
def test_null_directions_get_zero(method: str, dtype: torch.dtype, layout: str) -> None:
    """Low rank, multiplied out in the matrix's own dtype as a gradient is: only rounding is left of the rest.

    `scipy.linalg.polar` completes the null space somehow; what it does on the rest is the pseudo-inverse's.
    """
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        m, n, rank = (
            int(torch.randint(*bounds, (1,), generator=generator)) for bounds in ((9, 40), (9, 60), (1, 8))
        )
        m, n = (min(m, n), max(m, n)) if layout == "wide" else (max(m, n), min(m, n))
        matrix = normal(m, rank, seed=seed, dtype=dtype) @ normal(rank, n, seed=seed + 999, dtype=dtype)
        found = whiten(matrix, method)
        u, _, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
        row_space = torch.from_numpy(vh[:rank].T @ vh[:rank])
        assert error(found, torch.from_numpy(u[:, :rank] @ vh[:rank])) < (
            1e-4 if dtype == torch.float32 else 1e-11
        )
        assert error(found, polar(matrix) @ row_space) < (1e-4 if dtype == torch.float32 else 1e-11)
        null = torch.from_numpy(scipy.linalg.null_space(matrix.double().numpy(), rcond=1e-6))
        assert float((found.double() @ null).abs().max()) < (1e-4 if dtype == torch.float32 else 1e-11)


@every_exact_method
def test_exact_zeros_stay_zero(method: str) -> None:
    """Units that are never active, inputs that never occur, units that are copies of one another."""
    matrix = normal(12, 9)
    matrix[[2, 7]] = 0
    matrix[:, 4] = 0
    matrix[5] = matrix[6]
    found = whiten(matrix, method)
    assert float(found[[2, 7]].abs().max()) < 1e-14
    assert float(found[:, 4].abs().max()) < 1e-14
    torch.testing.assert_close(found[5], found[6])
    expected = torch.tensor([0.0, 1.0]).double()[[0] + [1] * 8].flip(0)  # 9 columns, one of them zero
    torch.testing.assert_close(torch.linalg.svdvals(found), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("condition", "tolerance"), [(1e4, 1e-6), (1e5, 1e-4), (1e6, 1e-2)])
def test_eigh_resolves_what_float32_can_hold(condition: float, tolerance: float) -> None:
    values = torch.logspace(0, -math.log10(condition), 30, dtype=torch.float64)
    matrix = with_spectrum(30, 50, values).float()
    assert error(whiten(matrix), polar(matrix)) < tolerance


def test_what_the_gram_matrix_cannot_resolve_counts_as_zero() -> None:
    """Below sqrt(eps) of the largest, a root of an eigenvalue is rounding; `svd` has no such bound."""
    matrix = with_spectrum(3, 4, torch.tensor([1.0, 0.5, 1e-10], dtype=torch.float64))
    for rcond in (None, 0.0, 1e-12):
        values = torch.linalg.svdvals(whiten(matrix, "eigh", rcond=rcond))
        torch.testing.assert_close(values, torch.tensor([1.0, 1.0, 0.0]).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(whiten(matrix, "svd")), torch.ones(3).double())


@every_exact_method
@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({}, 4),
        ({"rcond": 0.005}, 3),
        ({"rcond": 0.5}, 1),
        ({"rank": 2}, 2),
        ({"rank": 9}, 4),
        ({"rank": 3, "rcond": 0.05}, 2),
    ],
)
def test_rank_and_rcond_keep_the_largest_directions(
    method: str, arguments: dict[str, Any], kept: int
) -> None:
    diagonal = torch.diag(torch.tensor([0.1, -1.0, 0.01, 0.001], dtype=torch.float64))
    order = [1, 0, 2, 3]
    expected = torch.zeros(4, 4).double()
    for index in order[:kept]:
        expected[index, index] = diagonal[index, index].sign()
    # a random test matrix mixes in some of the other directions, 0.1^4 of them after two power iterations
    tolerance = 1e-2 if method == "rsvd" and kept < 4 else 1e-12
    torch.testing.assert_close(whiten(diagonal, method, **arguments), expected, rtol=0, atol=tolerance)


def test_rsvd_is_the_published_algorithm() -> None:
    """Alg. 3 and the last line of Alg. 2, written out in numpy with the same test matrix."""
    matrix = normal(14, 22).numpy()
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(22, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).numpy()
    for _ in range(2):
        q = np.linalg.qr(matrix @ q)[0]
        q = np.linalg.qr(matrix.T @ q)[0]
    u, s, _ = np.linalg.svd(matrix @ q, full_matrices=False)
    expected = u @ np.diag(1 / s) @ u.T @ matrix
    found = whiten(torch.from_numpy(matrix), "rsvd", rank=6, generator=generator)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-11)


def test_rsvd_draws_from_its_generator_alone() -> None:
    matrix, state = normal(20, 30), torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    first, second = (whiten(matrix, "rsvd", rank=4, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, whiten(matrix, "rsvd", rank=4, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(whiten(matrix, "rsvd", rank=4), whiten(matrix, "rsvd", rank=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_rsvd_finds_the_leading_directions_of_a_decaying_spectrum() -> None:
    matrix = with_spectrum(40, 60, 2.0 ** -torch.arange(40, dtype=torch.float64))
    assert error(whiten(matrix, "rsvd", rank=8), whiten(matrix, "svd", rank=8)) < 0.02


def test_newton_schulz_acts_on_singular_values_alone() -> None:
    """The published polynomial and the classical one, applied to the singular values in numpy."""
    values = torch.logspace(0, -6, 25, dtype=torch.float64)
    x = (values / values.norm()).numpy()
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5 + [(15 / 8, -10 / 8, 3 / 8)] * 3:
        x = a * x + b * x**3 + c * x**5
    expected = with_spectrum(25, 31, torch.from_numpy(x))
    assert error(whiten(with_spectrum(25, 31, values), "newton_schulz"), expected) < 1e-10
    resolved = (values / values.norm() > 1e-3).numpy()
    assert np.abs(x[resolved] - 1).max() < 1e-4
    assert (x[~resolved] < 1.001).all()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_newton_schulz_is_nearer_to_the_polar_factor_than_muons(shape: tuple[int, int]) -> None:
    """torch's own stops after the five lifting steps, in bfloat16, with singular values from 0.7 to 1.2."""
    matrix = with_spectrum(*shape, torch.logspace(0, -2, 24, dtype=torch.float64)).float()
    theirs = _zeropower_via_newtonschulz(matrix, (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5, EPS)
    assert error(whiten(matrix, "newton_schulz"), polar(matrix)) < 1e-3
    assert 0.1 < error(theirs, polar(matrix)) < 0.4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_colnorm_gives_every_output_unit_the_same_speed(dtype: torch.dtype, tolerance: float) -> None:
    """Also where the squares of some rows underflow next to others, whose squares overflow."""
    matrix = (normal(7, 11) * torch.logspace(-16, 20, 7, dtype=torch.float64)[:, None]).to(dtype)
    matrix[3] = 0
    exact = matrix.double().numpy()
    norms = np.sqrt((exact**2).sum(1, keepdims=True))
    expected = exact / np.where(norms == 0, 1, norms)
    np.testing.assert_allclose(whiten(matrix, "colnorm").numpy(), expected, rtol=0, atol=tolerance)


# Invariances


@every_method
@derandomised
@given(seed=st.integers(0, 10**6), m=st.integers(1, 12), n=st.integers(1, 12), exponent=st.integers(-28, 28))
def test_scale_sign_and_order_of_units(method: str, seed: int, m: int, n: int, exponent: int) -> None:
    matrix = normal(m, n, seed=seed, dtype=torch.float32)
    found = whiten(matrix, method)
    torch.testing.assert_close(whiten(matrix * 10.0**exponent, method), found, rtol=0, atol=1e-3)
    if method == "rsvd":
        return
    torch.testing.assert_close(whiten(-matrix, method), -found, rtol=0, atol=1e-3)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(whiten(matrix[order], method), found[order], rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["eigh", "svd", "newton_schulz"])
@derandomised
@given(seed=st.integers(0, 10**6), m=st.integers(1, 12), n=st.integers(1, 12))
def test_rotations_and_transposition(method: str, seed: int, m: int, n: int) -> None:
    """EGD(Q G R) = Q EGD(G) R for orthogonal Q and R, and EGD(G^T) = EGD(G)^T."""
    values = 10 ** -torch.linspace(0, 2, min(m, n)).double()
    matrix = with_spectrum(m, n, values, seed)
    q, r = orthonormal(m, m, seed + 1), orthonormal(n, n, seed + 2)
    found = whiten(matrix, method)
    torch.testing.assert_close(whiten(q @ matrix @ r, method), q @ found @ r, rtol=0, atol=1e-10)
    torch.testing.assert_close(whiten(matrix.mT, method), found.mT, rtol=0, atol=1e-10)


def test_whitening_twice_is_whitening_once() -> None:
    matrix = normal(6, 4) @ normal(4, 9, seed=1)
    once = whiten(matrix)
    torch.testing.assert_close(whiten(once), once, rtol=0, atol=1e-12)
    torch.testing.assert_close(once @ once.mT @ once, once, rtol=0, atol=1e-12)  # a partial isometry


# No input gives a NaN


def hostile(count: int, dtype: torch.dtype) -> Tensor:
    """`(count, 3, 5)`: scales from the smallest to the largest float32; zeros, copies, low rank."""
    batch = normal(count, 3, 5, seed=7)
    kind = torch.arange(count) % 8
    batch[kind == 1] = 0
    batch[kind == 2, 1] = 0
    batch[kind == 3, 2] = batch[kind == 3, 0]
    batch[kind == 4] = batch[kind == 4, :, :1] * batch[kind == 4, :1]
    batch[kind == 5, :, 1:] *= 1e-20
    batch[kind == 6] = batch[kind == 6].sign()
    batch[kind == 7] *= torch.tensor([[1e-12], [1.0], [1e12]])
    exponents = torch.rand(count, generator=torch.Generator().manual_seed(8), dtype=torch.float64) * 82 - 44
    limit = float(torch.finfo(torch.bfloat16).max)
    return (batch * 10.0 ** exponents[:, None, None]).clamp(-limit, limit).to(dtype)


@pytest.mark.parametrize(
    ("method", "count"),
    [("eigh", 100_000), ("svd", 10_000), ("rsvd", 5_000), ("newton_schulz", 100_000), ("colnorm", 100_000)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_gradients_give_finite_results(method: str, count: int, dtype: torch.dtype) -> None:
    """E6."""
    batch = hostile(count if dtype == torch.float32 else count // 10, dtype)
    assert bool(batch.isfinite().all())
    found = whiten(batch, method)
    assert bool(found.isfinite().all())
    assert bool((found[(batch == 0).all((1, 2))] == 0).all())
    assert float(found.float().abs().max()) < 1.3
    with_rank = torch.linalg.matrix_norm(found.float(), ord=2)[(batch != 0).any((1, 2))]
    assert float(with_rank.min()) > 0.9


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_matrix_is_returned_as_it_is(method: str, value: float) -> None:
    batch = normal(4, 3, 5)
    batch[1, 2, 3], batch[2] = value, 0
    found = whiten(batch, method)
    torch.testing.assert_close(found[1], batch[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[2], torch.zeros(3, 5).double())
    if method == "rsvd":  # every matrix of a batch has a test matrix of its own
        assert error(found[3], polar(batch[3])) < 1e-12
    else:
        torch.testing.assert_close(found[3], whiten(batch[3], method), rtol=0, atol=1e-14)


@every_method
def test_a_batch_is_its_matrices(method: str) -> None:
    batch = normal(2, 3, 6, 4)
    found = whiten(batch, method)
    for index in np.ndindex(2, 3):
        torch.testing.assert_close(found[index], whiten(batch[index], method), rtol=0, atol=1e-13)
    assert whiten(torch.zeros(0, 3, 2), method).shape == (0, 3, 2)
    assert whiten(torch.zeros(2, 0, 3), method).shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"matrix": torch.ones(3)},
            r"matrix must be a floating-point tensor of shape \(..., m, n\), got \(3,\)",
        ),
        ({"matrix": torch.ones(2, 2, dtype=torch.int64)}, "torch.int64"),
        ({"matrix": [[1.0]]}, "got list"),
        ({"method": "cholesky"}, "method must be one of 'eigh', .*, got 'cholesky'"),
        ({"method": "rsvd", "rank": 0}, "rank must be an integer >= 1 or None, got 0"),
        ({"rank": True}, "rank must be"),
        ({"rank": 2.0}, "rank must be"),
        ({"rcond": 1.0}, r"rcond must be a number in \[0, 1\), got 1.0"),
        ({"rcond": -1e-9}, "rcond must be"),
        ({"rcond": math.nan}, "rcond must be"),
        ({"method": "colnorm", "rank": 2}, "rank must be None for method 'colnorm'"),
        ({"method": "newton_schulz", "rcond": 0.1}, "rcond must be None for method 'newton_schulz'"),
        ({"generator": 0}, "generator must be"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whiten(**{"matrix": torch.ones(2, 2), **arguments})
