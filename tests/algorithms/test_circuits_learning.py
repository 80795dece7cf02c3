"""Learning rules of circuits: closed forms, monotone likelihoods, rows that stay distributions, resuming."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pydoc_data import topics
from typing import Any, cast

import numpy as np
import pytest
import torch
from hmmlearn.hmm import GaussianHMM
from tests.algorithms.circuits_reference import (
    DISCRETE,
    REAL,
    categorical_data,
    definition,
    everything,
    generator,
    real_data,
    with_missing,
)
from torch import Tensor

from piste_algorithms.circuits import (
    AdamCircuit,
    Anemone,
    Circuit,
    FullBatchEM,
    LearningRule,
    MiniBatchEM,
    OnlineEM,
    cosine_decay,
    hclt,
    hmm,
    power_decay,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)


def tree(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Circuit, Tensor]:
    x = categorical_data(120, 6, 3, seed=seed)
    return hclt(x, 4, dtype=dtype, generator=generator(seed)), x


ALL = {**DISCRETE, **REAL}
RULES: dict[str, Callable[[Circuit], LearningRule]] = {
    "full": lambda circuit: FullBatchEM(circuit, 1e-3),
    "mini": lambda circuit: MiniBatchEM(circuit, 0.3),
    "online": OnlineEM,
    "anemone": Anemone,
    "anemone with momentum": lambda circuit: Anemone(circuit, 0.4, momentum=0.9, updates_every=2),
    "adam": lambda circuit: AdamCircuit(circuit, 0.05),
}


@pytest.mark.parametrize("name", ALL)
def test_full_batch_em_never_lowers_the_likelihood(name: str) -> None:
    circuit = ALL[name]()
    x = real_data(40, circuit.variables, 2) if name in REAL else everything(circuit)[::3]
    x = torch.cat((x, with_missing(x)))
    rule = FullBatchEM(circuit)
    found = [rule.step(x).log_likelihood for _ in range(15)]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(found))
    assert found[-1] > found[0] + 1e-3


def test_em_of_a_normal_hidden_markov_model_is_that_of_hmmlearn() -> None:
    x = real_data(30, 8, 1)
    circuit = hmm(8, 3, None, generator=generator(1), dtype=torch.float64)
    start = circuit.parameters()
    peer = GaussianHMM(
        3, n_iter=1, tol=-1, init_params="", params="stmc", covariance_type="diag", covars_prior=0
    )
    peer.covars_weight, peer.means_weight, peer.min_covar = 1, 0, 1e-6
    peer.startprob_, peer.transmat_ = start["initial"].numpy(), start["transition"].numpy()
    peer.means_ = start["emission"][:, :1].numpy()
    peer.covars_ = start["emission"][:, 1:].numpy()
    flat, lengths = x.reshape(-1, 1).numpy(), [8] * 30
    rule = FullBatchEM(circuit)
    assert rule.step(x).log_likelihood * 30 == pytest.approx(peer.score(flat, lengths), rel=1e-10)
    peer.fit(flat, lengths)
    np.testing.assert_allclose(circuit.parameters()["transition"].numpy(), peer.transmat_, rtol=1e-8)
    np.testing.assert_allclose(circuit.parameters()["emission"][:, 0].numpy(), peer.means_[:, 0], rtol=1e-8)


def test_anemone_at_step_one_on_all_data_is_full_batch_em() -> None:
    for name in ("hclt", "pd", "hmm", "tied tree"):
        circuit, other = DISCRETE[name](), DISCRETE[name]()
        x = everything(circuit)[::2]
        Anemone(circuit, 1.0, pseudocount=0.0).step(x)
        FullBatchEM(other).step(x)
        for table, value in circuit.parameters().items():
            close(value, other.parameters()[table], 1e-12)


@pytest.mark.parametrize("name", ["hclt", "pd", "tied tree", "hmm", "hclt of real values"])
def test_anemone_is_a_step_of_each_node_by_its_implicit_learning_rate(name: str) -> None:
    """The moments of a node go from its own to those of the batch, F / F_n, by eta_n."""
    circuit = ALL[name]()
    x = real_data(9, circuit.variables, 2) if name in REAL else everything(circuit)[::5]
    alpha, before = 0.3, circuit.parameters()
    flows, top_down = circuit.flows(x)[1], circuit.top_down()
    info = Anemone(circuit, alpha, pseudocount=0.0).step(x)
    rates = []
    for table, description in circuit.structure.tables.items():
        after = circuit.parameters()[table]
        if description.kind == "gaussian":
            reached, expected = flows[table][..., :1], top_down[table][..., :1]
            old = top_down[table] / expected
            found = torch.stack(
                (torch.ones_like(after[..., 0]), after[..., 0], after[..., 1] + after[..., 0] ** 2), -1
            )
        else:
            reached, expected = flows[table].sum(-1, keepdim=True), top_down[table].sum(-1, keepdim=True)
            old, found = before[table], after
        # eta_n = alpha F_n / M / (alpha F_n / M + (1 - alpha) TD(n))
        eta = alpha * reached / len(x) / (alpha * reached / len(x) + (1 - alpha) * expected)
        close(found, (1 - eta) * old + eta * flows[table] / reached)
        rates.append(eta.flatten())
    everywhere = torch.cat(rates)
    assert info.rate_min == pytest.approx(float(everywhere.min()), rel=1e-9)
    assert info.rate_mean == pytest.approx(float(everywhere.mean()), rel=1e-9)
    assert info.rate_max == pytest.approx(float(everywhere.max()), rel=1e-9)
    assert info.step_size == alpha


def test_momentum_averages_raw_flows_and_corrects_for_the_start() -> None:
    circuit, x = tree()
    rule = Anemone(circuit, 0.5, momentum=0.8, pseudocount=0.0)
    average = circuit.empty_statistics()
    for update, batch in enumerate(torch.split(x, 40)):
        before, top_down = circuit.parameters(), circuit.top_down()
        for table, value in circuit.flows(batch)[1].items():
            average[table] = 0.8 * average[table] + 0.2 * value
        rule.step(batch)
        for table in before:
            flows = average[table] / (1 - 0.8 ** (update + 1))
            expected = 0.5 * flows / 40 + 0.5 * top_down[table]
            close(circuit.parameters()[table], expected / expected.sum(-1, keepdim=True))


def test_online_em_averages_statistics() -> None:
    circuit, x = tree()
    rule = OnlineEM(circuit, pseudocount=0.0)
    average = circuit.empty_statistics()
    for update, batch in enumerate(torch.split(x, 30)):
        gamma = (update + 1) ** -0.6
        for table, value in circuit.flows(batch)[1].items():
            average[table] = (1 - gamma) * average[table] + gamma * value / 30
        rule.step(batch)
        for table, value in circuit.parameters().items():
            close(value, average[table] / average[table].sum(-1, keepdim=True))


def test_adam_follows_the_gradient_that_autograd_finds() -> None:
    """Five steps of torch's Adam on softmaxes of logits, through the definition."""
    for name in ("hclt", "tied tree", "hmm of real values"):
        circuit = ALL[name]()
        x = real_data(6, circuit.variables, 2) if name in REAL else everything(circuit)[::9]
        kinds = {table: value.kind for table, value in circuit.structure.tables.items()}
        free = {
            table: (
                torch.stack((value[..., 0], value[..., 1].log()), -1)
                if kinds[table] == "gaussian"
                else value.log()
            ).requires_grad_()
            for table, value in circuit.parameters().items()
        }

        def bound(free: dict[str, Tensor] = free, kinds: dict[str, Any] = kinds) -> dict[str, Tensor]:
            return {
                table: torch.stack((value[..., 0], value[..., 1].exp()), -1)
                if kinds[table] == "gaussian"
                else value.softmax(-1)
                for table, value in free.items()
            }

        adam = torch.optim.Adam(free.values(), lr=0.03, betas=(0.9, 0.99))
        rule = AdamCircuit(circuit, 0.03)
        for _ in range(5):
            loss = -definition(circuit.structure, bound(), x).mean()
            for value, gradient in zip(
                free.values(), torch.autograd.grad(loss, list(free.values())), strict=True
            ):
                value.grad = gradient
            adam.step()
            rule.step(x)
        for table, value in circuit.parameters().items():
            close(value, bound()[table].detach(), 1e-7)


@pytest.mark.parametrize("name", RULES)
def test_flows_of_two_workers_and_of_parts_make_the_update_of_one(name: str) -> None:
    """Each gathers its rows, one of them in two parts, all sum what they gathered, and update alike."""
    (alone, x), (first, _), (second, _) = tree(), tree(), tree()
    one, left, right = RULES[name](alone), RULES[name](first), RULES[name](second)
    idle = RULES[name](tree()[0])
    for batch in torch.split(x, 40):
        one.accumulate(batch)
        info = one.update()
        left.accumulate(batch[:11])
        left.accumulate(batch[11:25])
        right.accumulate(batch[25:])
        workers = (left, right, idle)
        sums = {key: sum(rule.accumulated()[key] for rule in workers) for key in left.accumulated()}
        for rule in workers:
            for key, tensor in rule.accumulated().items():
                tensor.copy_(torch.as_tensor(sums[key]))
            shared = rule.update()
            assert shared.samples == info.samples == 40
            assert shared.log_likelihood == pytest.approx(info.log_likelihood, rel=1e-12)
        for table, value in alone.parameters().items():
            for rule in workers:
                close(rule.circuit.parameters()[table], value)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_stay_distributions(name: str, dtype: torch.dtype) -> None:
    """Few data, many states, categories that never occur, missing values, single rows, impossible rows."""
    x = with_missing(categorical_data(24, 8, 2), share=0.2)
    x[5] = -1
    circuit = hclt(x, 12, num_categories=7, dtype=dtype, generator=generator(3), spread=30.0)
    emission = circuit.parameters()["emission"]
    emission[2, :, 6] = 0.0
    circuit.set_parameters({"emission": emission / emission.sum(-1, keepdim=True)})
    x[7, 2] = 6
    rule = RULES[name](circuit)
    impossible = 0
    for _ in range(40):
        for batch in (x[:3], x[3:4], x[4:20], x[20:]):
            info = rule.step(batch)
            impossible += info.impossible if info.updated else 0
            for value in circuit.parameters().values():
                assert bool(torch.isfinite(value).all())
                assert float((value.double().sum(-1) - 1).abs().max()) < 2e-6
    assert impossible == 40
    assert bool(torch.isfinite(circuit.log_likelihood(x[:5])).all())
    # A parameter that is zero stays zero.
    assert float(circuit.parameters()["emission"][2, :, 6].abs().max()) == 0.0


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_values_leave_normal_densities_finite(name: str, dtype: torch.dtype) -> None:
    x = real_data(24, 4).to(dtype)
    circuit = hclt(x, 3, dtype=dtype, generator=generator(0))
    rule = RULES[name](circuit)
    x[::3, 1] = 0.99 * torch.finfo(dtype).max ** 0.4
    x[1::3, 2] = -x[0, 1]
    for _ in range(6):
        for batch in (x[:8], x[8:]):
            rule.step(batch)
            assert all(bool(torch.isfinite(value).all()) for value in circuit.parameters().values())
            assert bool((circuit.parameters()["emission"][..., 1] > 0).all())
    assert not bool(circuit.log_likelihood(x).isnan().any())


@pytest.mark.parametrize("lr", [1.0, 100.0])
def test_gradients_leave_normal_densities_finite(lr: float) -> None:
    x = real_data(40, 6).float()
    x[::5, 2] = math.nan
    x[:, 4] = 1.0
    circuit = hclt(x, 3, generator=generator(0))
    rule = AdamCircuit(circuit, lr)
    for start in range(30):
        rule.step(x[start : start + 5])
        mean, variance = circuit.parameters()["emission"].unbind(-1)
        assert bool(torch.isfinite(mean).all())
        assert bool((variance > 0).all() and torch.isfinite(variance).all())
    assert not bool(circuit.log_likelihood(x).isnan().any())


@pytest.mark.parametrize(
    "rule", [FullBatchEM, lambda c: MiniBatchEM(c, 0.5, 0.0), lambda c: Anemone(c, 0.5, pseudocount=0.0)]
)
def test_a_node_that_no_sample_reaches_stays(rule: Callable[[Circuit], LearningRule]) -> None:
    circuit = hmm(4, 3, 2, dtype=torch.float64)
    transition = torch.tensor([[0.5, 0.5, 0.0], [0.3, 0.7, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    circuit.set_parameters(
        {"initial": torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64), "transition": transition}
    )
    emission = circuit.parameters()["emission"]
    info = rule(circuit).step(everything(circuit)[:5])
    close(circuit.parameters()["transition"][2], transition[2])
    close(circuit.parameters()["emission"][2], emission[2])
    assert float(circuit.parameters()["transition"][:2, 2].max()) == 0.0
    assert info.rate_min == 0.0


@pytest.mark.parametrize("name", RULES)
def test_resume_is_bit_for_bit(name: str) -> None:
    """In the middle of gathering, through torch.save and its safe loading."""
    (circuit, x), (other, _) = tree(), tree(seed=0)
    batches = torch.split(x, 25)
    rule = RULES[name](circuit)
    for batch in batches[:3]:
        rule.step(batch)
    file = io.BytesIO()
    torch.save({"rule": rule.state_dict(), "circuit": circuit.parameters()}, file)
    file.seek(0)
    state = torch.load(file)
    other.set_parameters(state["circuit"])
    resumed = RULES[name](other)
    resumed.load_state_dict(state["rule"])
    for batch in batches[3:] + batches:
        assert rule.step(batch) == resumed.step(batch)
    for table, value in circuit.parameters().items():
        assert torch.equal(value, other.parameters()[table])
    with pytest.raises(ValueError, match=r"state must hold .*got updates"):
        resumed.load_state_dict({"updates": 1})
    with pytest.raises(ValueError, match="state must be that of"):
        resumed.load_state_dict({**state["rule"], "rule": "another"})
    if name not in ("full", "mini", "anemone"):  # nothing of theirs is as large as the circuit
        with pytest.raises(ValueError, match="must be of shape"):
            RULES[name](hmm(3, 2, 2)).load_state_dict(state["rule"])


def test_batches_are_gathered_before_an_update() -> None:
    circuit, x = tree()
    rule = Anemone(circuit, 0.4, updates_every=3)
    before = circuit.parameters()
    for part in (x[:40], x[40:80]):
        info = rule.step(part)
        assert not info.updated
        assert info.samples == 40
        assert info.rate_mean is None
    for table, value in circuit.parameters().items():
        assert torch.equal(value, before[table])
    assert rule.step(x[80:]).samples == 120
    other, _ = tree()
    Anemone(other, 0.4).step(x)
    for table, value in circuit.parameters().items():
        close(value, other.parameters()[table])


def test_anemone_overtakes_mini_batch_em_within_half_its_epochs_on_text() -> None:
    """Windows of 32 letters of Python's manual, a model of 16 states, batches of 128, published steps."""
    letters = re.sub(r"[^a-z]+", " ", " ".join(topics.topics.values()).lower())
    codes = torch.tensor([0 if letter == " " else ord(letter) - 96 for letter in letters])
    x = codes[: len(codes) // 32 * 32].view(-1, 32)
    x = x[torch.randperm(len(x), generator=generator(0))]
    train, valid = x[:2000], x[2000:2500]
    found: dict[str, list[float]] = {}
    rules: dict[str, Callable[[Circuit], LearningRule]] = {
        "mini": lambda c: MiniBatchEM(c, 0.1),
        "anemone": Anemone,
    }
    for name, make in rules.items():
        circuit = hmm(32, 16, 27, generator=generator(1))
        rule = make(circuit)
        found[name] = []
        for epoch in range(8):
            order = torch.randperm(len(train), generator=generator(epoch))
            for batch in torch.split(train[order], 128):
                rule.step(batch)
            found[name].append(float(circuit.log_likelihood(valid).mean()))
    assert max(found["anemone"][:4]) > max(found["mini"]) + 1.0


def test_cosine_decay_is_flat_then_half_a_cosine_then_its_minimum() -> None:
    schedule = cosine_decay(0.4, 10, 110, 0.1)
    assert [schedule(update) for update in (0, 9, 10)] == [0.4, 0.4, 0.4]
    assert schedule(60) == pytest.approx(0.2)
    assert schedule(35) == pytest.approx(0.2 * (1 + math.cos(math.pi / 4)))
    assert schedule(109) == schedule(111) == schedule(10**6) == 0.1
    assert [power_decay()(update) for update in (0, 31)] == [1.0, pytest.approx(32**-0.6)]


def test_a_schedule_that_leaves_the_range_is_named_and_nothing_is_lost() -> None:
    circuit, x = tree()
    rule = Anemone(circuit, lambda update: 0.5 - update)
    rule.step(x)
    before = circuit.parameters()
    with pytest.raises(ValueError, match=r"step_size\(1\) must be a number in \(0, 1\], got -0.5"):
        rule.step(x)
    for table, value in circuit.parameters().items():
        assert torch.equal(value, before[table])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: Anemone(c, 0.0), r"step_size must be a number in \(0, 1\], got 0.0"),
        (lambda c: Anemone(c, 1.5), r"step_size must be a number in \(0, 1\], got 1.5"),
        (lambda c: MiniBatchEM(c, math.nan), r"step_size must be a number in \(0, 1\], got nan"),
        (lambda c: OnlineEM(c, -0.1), r"step_size must be a number in \(0, 1\]"),
        (lambda c: Anemone(c, momentum=1.0), r"momentum must be a number in \[0, 1\), got 1.0"),
        (lambda c: Anemone(c, updates_every=0), "updates_every must be an integer >= 1, got 0"),
        (lambda c: FullBatchEM(c, -1.0), r"pseudocount must be a number in \[0, inf\), got -1.0"),
        (lambda c: AdamCircuit(c, 0.0), r"lr must be a number in \(0, inf\), got 0.0"),
        (lambda c: AdamCircuit(c, betas=(0.9, 1.0)), "betas"),
        (lambda _: Anemone(cast(Any, "c")), "circuit must be a Circuit, got str"),
        (lambda c: cosine_decay(0.4, 10, 5, 0.1), "total_steps must be an integer >= 10, got 5"),
        (lambda c: cosine_decay(0.1, 0, 5, 0.4), r"minimum must be in \(0, base = 0.1\], got 0.4"),
        (lambda c: power_decay(0.5), r"exponent must be a number in \(0.5, 1\), got 0.5"),
    ],
)
def test_arguments_are_checked(make: Callable[[Any], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tree()[0])


def test_batches_that_cannot_be_learnt_from_are_refused() -> None:
    circuit, x = tree()
    rule = Anemone(circuit)
    with pytest.raises(
        ValueError, match=r"x must be a tensor \(batch, 6\) of at least one row, got \(0, 6\)"
    ):
        rule.step(x[:0])
    broken = x[:5].clone()
    broken[3, 2] = 3
    with pytest.raises(
        ValueError, match=r"x\[3, 2\] \(row, column\) must be a whole number from 0 to 2, or missing"
    ):
        rule.step(broken)
    with pytest.raises(ValueError, match="update needs samples of positive probability"):
        rule.update()
    emission = circuit.parameters()["emission"]
    emission[0] = torch.tensor([1.0, 0.0, 0.0])
    circuit.set_parameters({"emission": emission})
    before = circuit.parameters()
    with pytest.raises(ValueError, match="got 2 of probability zero and no other"):
        rule.step(torch.tensor([[1, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]]))
    for table, value in circuit.parameters().items():
        assert torch.equal(value, before[table])
    assert rule.step(x).updated
