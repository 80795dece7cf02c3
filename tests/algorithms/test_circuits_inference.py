"""Every kind of circuit: likelihoods, flows and top-down probabilities against the definition by autograd."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.algorithms.circuits_reference import (
    DISCRETE,
    REAL,
    definition,
    definition_flows,
    everything,
    generator,
    real_data,
    with_missing,
)
from torch import Tensor

import piste_algorithms.circuits.circuit as circuit_module
from piste_algorithms.circuits import Circuit, hclt, hmm, log_domain, pd
from piste_algorithms.circuits.chain import Chain
from piste_algorithms.circuits.folded import Folded


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)


def rows_of(name: str, circuit: Circuit) -> Tensor:
    """Complete rows, rows with missing values and one with nothing but them."""
    if name in REAL:
        x = real_data(6, circuit.variables, seed=3)
        return torch.cat((x, with_missing(x), torch.full_like(x[:1], math.nan)))
    x = everything(circuit)
    x = x[torch.randperm(len(x), generator=generator(0))[:10]]
    return torch.cat((x, with_missing(x), torch.full_like(x[:1], -1)))


ALL = {**DISCRETE, **REAL}


@pytest.mark.parametrize("name", ALL)
def test_likelihoods_and_flows_are_those_of_the_definition(name: str) -> None:
    circuit = ALL[name]()
    x = rows_of(name, circuit)
    expected, flows = definition_flows(circuit, x)
    close(circuit.log_likelihood(x), expected)
    log_likelihood, found = circuit.flows(x)
    close(log_likelihood, expected)
    for table, description in circuit.structure.tables.items():
        if description.kind != "gaussian":
            close(found[table], flows[table])
            continue
        # theta dlog p / dtheta of mean m and variance s, from the sums S of F_n (1, x, x^2):
        # m (S_1 - m S_0) / s and ((S_2 - 2 m S_1 + m^2 S_0) / s - S_0) / 2
        m, s = circuit.parameters()[table].unbind(-1)
        count, first, second = found[table].unbind(-1)
        close(m * (first - m * count) / s, flows[table][..., 0])
        close(((second - 2 * m * first + m * m * count) / s - count) / 2, flows[table][..., 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_ordinary_rows_need_no_log_domain(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    circuit = ALL[name]().to(dtype=dtype)
    monkeypatch.setattr(log_domain, "flows", None)
    monkeypatch.setattr(log_domain, "region_values", None)
    x = rows_of(name, circuit)
    torch.testing.assert_close(circuit.flows(x)[0], circuit.log_likelihood(x))


@pytest.mark.parametrize("name", ALL)
def test_the_log_domain_agrees(name: str) -> None:
    circuit = ALL[name]()
    x = rows_of(name, circuit)
    log_likelihood, flows = circuit.flows(x)
    slow, slow_flows = log_domain.flows(circuit.structure, circuit.parameters(), x)
    close(slow, log_likelihood)
    for table, value in flows.items():
        close(slow_flows[table].reshape(value.shape), value)


@pytest.mark.parametrize("name", DISCRETE)
def test_probabilities_sum_to_one_and_expected_flows_are_top_down_probabilities(name: str) -> None:
    circuit = DISCRETE[name]()
    x = everything(circuit)
    probabilities = circuit.log_likelihood(x).exp()
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-12)
    expected = {table: torch.zeros_like(value) for table, value in circuit.parameters().items()}
    for row, probability in zip(x, probabilities, strict=True):
        for table, value in circuit.flows(row[None])[1].items():
            expected[table] += probability * value
    missing = torch.full((1, circuit.variables), -1)
    by_autograd = definition_flows(circuit, missing)[1]
    for table, value in circuit.top_down().items():
        close(value, expected[table])
        close(value, by_autograd[table])


@pytest.mark.parametrize("name", DISCRETE)
def test_marginals_are_sums_over_completions(name: str) -> None:
    circuit = DISCRETE[name]()
    x = with_missing(everything(circuit)[:: max(1, len(everything(circuit)) // 7)], share=0.5)
    for row in x:
        ranges = (
            range(count) if value < 0 else [value]
            for value, count in zip(row.tolist(), circuit.structure.categories, strict=True)
        )
        completions = torch.tensor(list(itertools.product(*ranges)))
        expected = circuit.log_likelihood(completions).logsumexp(0)
        close(circuit.log_likelihood(row[None])[0], expected)


def test_hidden_markov_models_have_their_scan_and_others_are_folded() -> None:
    for name, make in ALL.items():
        expected = Chain if name.startswith("hmm") else Folded
        assert isinstance(make()._engine, expected), name


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("hmm")])
def test_a_folded_chain_is_the_scan(name: str) -> None:
    circuit = ALL[name]()
    x = rows_of(name, circuit)
    scanned, flows = circuit.flows(x)
    top_down = circuit.top_down()
    circuit._engine = Folded(circuit.structure, circuit.device)
    folded, others = circuit.flows(x)
    close(folded, scanned)
    for table, value in flows.items():
        close(others[table], value)
        close(circuit.top_down()[table], top_down[table])


@pytest.mark.parametrize("name", ["hmm", "hclt", "pd"])
def test_pieces_of_a_batch_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    circuit = DISCRETE[name]()
    x = everything(circuit).repeat(2, 1)
    log_likelihood, flows = circuit.flows(x)
    monkeypatch.setattr(circuit_module.Circuit, "_rows", lambda *_: 5)
    in_pieces, others = circuit.flows(x)
    close(in_pieces, log_likelihood)
    close(circuit.log_likelihood(x), log_likelihood)
    for table, value in flows.items():
        close(others[table], value)


SHARP: dict[str, Callable[[torch.dtype], Circuit]] = {
    "hmm": lambda dtype: hmm(200, 4, 6, generator=generator(0), dtype=dtype, spread=60.0),
    "hclt": lambda dtype: hclt(
        torch.randint(6, (50, 60), generator=generator(1)),
        4,
        dtype=dtype,
        generator=generator(0),
        spread=60.0,
    ),
    "pd": lambda dtype: pd((60,), 4, 6, split=4, dtype=dtype, generator=generator(0), spread=60.0),
}


@pytest.mark.parametrize("name", SHARP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_underflow_have_the_likelihood_and_flows_of_the_log_domain(
    name: str, dtype: torch.dtype
) -> None:
    """Parameters down to 1e-26, data that contradict them: hundreds of factors of 1e-20."""
    circuit = SHARP[name](dtype)
    x = torch.randint(6, (8, circuit.variables), generator=generator(5))
    expected, expected_flows = log_domain.flows(circuit.structure, circuit.parameters(), x)
    assert float(expected.max()) < -200
    log_likelihood, flows = circuit.flows(x)
    rtol = 1e-5 if dtype == torch.float32 else 1e-11
    close(circuit.log_likelihood(x).double(), expected, rtol)
    close(log_likelihood.double(), expected, rtol)
    for table, value in flows.items():
        found = value.double().reshape(expected_flows[table].shape)
        torch.testing.assert_close(found, expected_flows[table], rtol=10 * rtol, atol=10 * rtol)


def test_past_and_future_that_contradict_each_other() -> None:
    """Two states that hardly mix: no filtered state explains what follows, in either precision."""
    for dtype, leak in ((torch.float32, 1e-37), (torch.float64, 1e-300)):
        circuit = hmm(8, 2, 2, dtype=dtype)
        circuit.set_parameters(
            {
                "initial": torch.tensor([0.5, 0.5], dtype=dtype),
                "transition": torch.tensor([[1.0, leak], [leak, 1.0]], dtype=dtype),
                "emission": torch.tensor([[1.0, leak], [leak, 1.0]], dtype=dtype),
            }
        )
        x = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0] * 8])
        log_likelihood, flows = circuit.flows(x)
        # One switch, in any of the ways that costs one factor `leak`: the transition between 3 and 4.
        assert float(log_likelihood[0]) == pytest.approx(math.log(0.5) + math.log(leak), rel=1e-6)
        close(flows["transition"][0, 1], torch.tensor(1.0, dtype=dtype), 1e-5)
        close(flows["initial"].sum(), torch.tensor(2.0, dtype=dtype), 1e-5)


def test_values_far_from_every_normal_density_have_a_finite_likelihood() -> None:
    circuit = hmm(3, 2, None, generator=generator(0), dtype=torch.float32)
    x = torch.tensor([[0.0, 1e3, -1e3]])
    expected = definition(circuit.structure, circuit.parameters(), x.double())
    assert not bool(torch.isfinite(expected).all())  # the definition underflows
    log_likelihood, flows = circuit.flows(x)
    assert bool(torch.isfinite(log_likelihood).all())
    close(flows["initial"].sum(), torch.tensor(1.0), 1e-5)


def test_an_impossible_row_has_no_flow_and_the_others_keep_theirs() -> None:
    for name in ("hmm", "hclt", "pd"):
        circuit = DISCRETE[name]()
        emission = circuit.parameters()["emission"]
        first = emission[0] if circuit.structure.tables["emission"].matrices > 1 else emission
        first.zero_()
        first[:, 0] = 1.0
        circuit.set_parameters({"emission": emission})
        x = torch.zeros((3, circuit.variables), dtype=torch.int64)
        x[1, 0] = 1
        log_likelihood, flows = circuit.flows(x)
        assert float(log_likelihood[1]) == -math.inf
        assert float(circuit.log_likelihood(x)[1]) == -math.inf
        for table, value in circuit.flows(x[[0, 2]])[1].items():
            close(flows[table], value)


def test_float32_is_near_float64() -> None:
    for make in DISCRETE.values():
        circuit = make()
        x = everything(circuit)
        single = circuit.to(dtype=torch.float32)
        assert single.dtype == torch.float32
        close(single.log_likelihood(x).double(), circuit.log_likelihood(x), 1e-5)
        assert single.log_likelihood(x).dtype == torch.float32
        assert circuit.log_likelihood(x).dtype == torch.float64
