"""Hidden Markov models: the scan against hmmlearn, enumeration and numbers worked out beforehand."""

import itertools
import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hmmlearn.hmm import CategoricalHMM
from torch import Tensor

from piste_algorithms.circuits import Anemone, Circuit, FullBatchEM, MiniBatchEM, hmm


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(values: list[float] | list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def worked_example() -> Circuit:
    circuit = hmm(3, 2, 2, dtype=torch.float64)
    circuit.set_parameters(
        {
            "initial": double([0.6, 0.4]),
            "transition": double([[0.7, 0.3], [0.2, 0.8]]),
            "emission": double([[0.9, 0.1], [0.25, 0.75]]),
        }
    )
    return circuit


BATCH = torch.tensor([[0, 0, 1], [1, 1, 0]])


def test_full_batch_em_is_that_of_hmmlearn() -> None:
    """Thirty iterations from one start: likelihoods and parameters to 1e-8 and better, never downhill."""
    logging.getLogger("hmmlearn").setLevel(logging.ERROR)
    states, length, categories, rows = 6, 20, 5, 40
    x = torch.randint(categories, (rows, length), generator=generator(1))
    circuit = hmm(length, states, categories, generator=generator(2), dtype=torch.float64)
    start = circuit.parameters()
    peer = CategoricalHMM(states, n_iter=1, tol=-1, init_params="", params="ste", n_features=categories)
    peer.startprob_, peer.transmat_ = start["initial"].numpy(), start["transition"].numpy()
    peer.emissionprob_ = start["emission"].numpy()
    rule = FullBatchEM(circuit)
    flat, lengths = x.reshape(-1, 1).numpy(), [length] * rows
    before = -np.inf
    for _ in range(30):
        expected = peer.score(flat, lengths)
        found = rule.step(x).log_likelihood * rows
        assert found == pytest.approx(expected, rel=1e-11)
        assert found >= before - 1e-9
        before = found
        peer.fit(flat, lengths)
    for name, theirs in (
        ("initial", peer.startprob_),
        ("transition", peer.transmat_),
        ("emission", peer.emissionprob_),
    ):
        np.testing.assert_allclose(circuit.parameters()[name].numpy(), theirs, rtol=1e-8, atol=1e-12)


def test_likelihoods_flows_and_expected_flows_of_a_worked_example() -> None:
    circuit = worked_example()
    log_likelihood, flows = circuit.flows(BATCH)
    expected = double([-1.9436596832541604, -2.5167565145100514])
    torch.testing.assert_close(log_likelihood, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(circuit.log_likelihood(BATCH), expected, rtol=1e-12, atol=0)
    worked = {
        "initial": double([0.9765428163666469, 1.023457183633353]),
        "transition": double(
            [[0.9923466844407487, 0.8113009971431009], [0.5294263550589126, 1.6669259633572377]]
        ),
        "emission": double(
            [[2.125422684371228, 0.37289317149507983], [0.8745773156287715, 2.62710682850492]]
        ),
    }
    for name, value in worked.items():
        torch.testing.assert_close(flows[name], value, rtol=1e-12, atol=0)
    top_down = circuit.top_down()
    torch.testing.assert_close(top_down["initial"], double([0.6, 0.4]), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        top_down["transition"], double([[0.77, 0.33], [0.18, 0.72]]), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        top_down["emission"], double([[1.395, 0.155], [0.3625, 1.0875]]), rtol=1e-12, atol=0
    )


def test_updates_of_a_worked_example() -> None:
    circuit = worked_example()
    info = Anemone(circuit, step_size=0.4, pseudocount=0.0).step(BATCH)
    anemone = circuit.parameters()
    initial = double([0.5553085632733293, 0.4446914367266706])
    torch.testing.assert_close(anemone["initial"], initial, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        anemone["transition"],
        double([[0.6470561626651918, 0.3529438373348082], [0.21841286850143285, 0.7815871314985672]]),
        rtol=1e-12,
        atol=0,
    )
    torch.testing.assert_close(
        anemone["emission"],
        double([[0.882784534372882, 0.117215465627118], [0.24989254274762418, 0.7501074572523758]]),
        rtol=1e-12,
        atol=0,
    )
    assert info.updated
    assert info.samples == 2
    circuit = worked_example()
    MiniBatchEM(circuit, step_size=0.4, pseudocount=0.0).step(BATCH)
    mini = circuit.parameters()
    torch.testing.assert_close(mini["initial"], initial, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        mini["transition"],
        double([[0.6400755046726936, 0.3599244953273064], [0.21641920389907143, 0.7835807961009286]]),
        rtol=1e-12,
        atol=0,
    )
    torch.testing.assert_close(
        mini["emission"],
        double([[0.8802968730924094, 0.1197031269075906], [0.2499036211868435, 0.7500963788131565]]),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize("homogeneous", [True, False])
def test_all_sequences_sum_to_one(homogeneous: bool) -> None:
    circuit = hmm(5, 3, 3, homogeneous, generator(0), torch.float64)
    everything = torch.tensor(list(itertools.product(range(3), repeat=5)))
    assert float(circuit.log_likelihood(everything).exp().sum()) == pytest.approx(1.0, abs=1e-12)
