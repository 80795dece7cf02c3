"""Kinds of prompts, objectives and the baselines."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import special, stats
from tests.algorithms.shifted_task import WIDTH, Task
from torch import Tensor, nn

from piste_algorithms.adaptation import (
    AdditivePrompt,
    EntropyMatching,
    FisherPrompt,
    GradientPrompt,
    NormalizationPrompt,
    Tent,
    TokenPrompt,
)
from piste_algorithms.adaptation.adapter import Adapter
from piste_algorithms.adaptation.objectives import EntropyMatch, InformationMaximization, Objective, entropies


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Convolutions(nn.Module):
    """A small image classifier with batch and group normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
        )
        self.head = nn.Linear(4, 3)
        for index, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=index) + (1.0 if parameter.ndim == 1 else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean((2, 3)))
        return out


class Tokens(nn.Module):
    """A transformer encoder layer over tokens, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)
        for index, parameter in enumerate(self.parameters()):
            parameter.data = 0.5 * normal(*parameter.shape, seed=index)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(tokens).mean(1))
        return out


def images(n: int, seed: int = 0) -> Tensor:
    return normal(n, 1, 8, 8, seed=seed)


def test_the_first_prompts_are_the_classifier_itself() -> None:
    classifier, x = Convolutions(), images(5)
    expected = classifier.eval()(x)
    classifier.train()
    additive, gains = AdditivePrompt(classifier), NormalizationPrompt(classifier)
    assert torch.equal(additive(x, additive.initial(x)), expected)
    assert torch.equal(gains(x, gains.initial()), expected)
    assert gains.initial().shape == (16,)
    assert classifier.training
    with torch.no_grad():
        classifier.head.weight.zero_()
    assert torch.equal(additive(x, additive.initial(x)), expected)  # a copy


def test_gains_go_where_they_belong() -> None:
    classifier, x = Convolutions().eval(), images(5)
    prompt = NormalizationPrompt(classifier)
    vector = normal(16, seed=5)
    for name, piece in zip(prompt.names, torch.split(vector, 4), strict=True):
        classifier.get_parameter(name).data.copy_(piece)
    torch.testing.assert_close(prompt(x, vector), classifier(x))


def test_batch_statistics_are_those_of_the_batch() -> None:
    classifier, x = Convolutions(), images(6)
    prompt = NormalizationPrompt(classifier, batch_statistics=True)
    expected = classifier.train()(x)
    torch.testing.assert_close(prompt(x, prompt.initial()), expected)
    torch.testing.assert_close(prompt(x, prompt.initial()), expected)  # nothing has run along


def test_a_classifier_without_gains_is_refused() -> None:
    with pytest.raises(ValueError, match="classifier must have normalisation layers"):
        NormalizationPrompt(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)))


def test_tokens_come_first() -> None:
    class Embed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1, 8)

    prompt = TokenPrompt(Embed(), lambda tokens: tokens.flatten(1))
    x, tokens = normal(3, 16), TokenPrompt.initial(2, 8, torch.Generator().manual_seed(0))
    logits = prompt(x, tokens)
    assert torch.equal(logits[:, :16], tokens.flatten().expand(3, 16))
    assert torch.equal(logits[:, 16:], x)
    drawn = TokenPrompt.initial(200, 50, torch.Generator().manual_seed(1))
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.05)
    with pytest.raises(ValueError, match="tokens must be an integer >= 1"):
        TokenPrompt.initial(0, 8, torch.Generator())


def prompted(kind: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Callable[[int], Tensor]]:
    if kind == "additive":
        model = AdditivePrompt(Convolutions())
        return model, model.initial(images(1)), lambda seed: images(40, seed)
    if kind == "gains":
        gains = NormalizationPrompt(Convolutions())
        return gains, gains.initial(), lambda seed: images(40, seed)
    tokens = TokenPrompt(lambda x: x, Tokens())
    return (
        tokens,
        tokens.initial(2, 8, torch.Generator().manual_seed(0)),
        lambda seed: normal(40, 4, 8, seed=seed),
    )


@pytest.mark.parametrize("kind", ["additive", "gains", "tokens"])
@pytest.mark.parametrize("build", [FisherPrompt, Tent, EntropyMatching, GradientPrompt])
def test_every_adapter_takes_every_prompt(kind: str, build: Callable[..., Adapter]) -> None:
    model, prompt, draw = prompted(kind)
    adapters = [build(model, prompt), build(model, prompt)]
    adapters[0].fit_source(draw(0))
    losses = []
    for seed in (1, 2, 3):
        info = adapters[0].adapt(1.5 * draw(seed) + 0.5)
        losses.append((info.loss, info.loss_after))
        assert info.accepted
    assert not torch.equal(adapters[0].prompt, prompt)
    assert adapters[0].prompt.dtype == torch.float32
    assert min(before - after for before, after in losses) > -0.1
    # and its state continues bit for bit
    file = io.BytesIO()
    torch.save(adapters[0].state_dict(), file)
    file.seek(0)
    adapters[1].load_state_dict(torch.load(file))
    x = draw(4) + 0.5
    assert adapters[0].adapt(x) == adapters[1].adapt(x)
    assert torch.equal(adapters[0].prompt, adapters[1].prompt)
    for adapter in adapters:
        adapter.reset()
        assert torch.equal(adapter.prompt, prompt)


# Objectives


def logits(n: int, classes: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * normal(n, classes, seed=seed).double()


def test_entropies_are_scipys() -> None:
    x = logits(20, 5, 0)
    expected = stats.entropy(special.softmax(x.numpy(), axis=1), axis=1)
    np.testing.assert_allclose(entropies(x.log_softmax(-1)).numpy(), expected, rtol=1e-12)
    assert Objective()(x.log_softmax(-1)) == pytest.approx(float(expected.mean()), rel=1e-12)
    certain = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=torch.float64)
    assert entropies(certain).tolist() == [0.0]


def test_information_maximization_is_entropy_and_a_divergence_from_the_prior() -> None:
    source, x = logits(50, 4, 1).log_softmax(-1), logits(20, 4, 2).log_softmax(-1)
    objective = InformationMaximization()
    objective.fit(source)
    prior, mean = source.exp().mean(0).numpy(), x.exp().mean(0).numpy()
    expected = float(entropies(x).mean()) + float(stats.entropy(mean, prior))
    assert float(objective(x)) == pytest.approx(expected, rel=1e-12)


def test_source_entropies_are_left_as_they_are() -> None:
    source = logits(4000, 6, 3).log_softmax(-1)
    objective = EntropyMatch()
    objective.fit(source)
    x = logits(500, 6, 4).log_softmax(-1)
    objective.begin(x)
    # Under the source the bet stays small, and targets are the entropies themselves.
    assert abs(objective.bet) < 0.4
    assert float((objective._targets - entropies(x)).abs().mean()) < 0.02
    assert float(objective(x)) < 1e-3


def test_shifted_entropies_are_matched_to_the_sources() -> None:
    objective = EntropyMatch()
    objective.fit(logits(4000, 6, 3).log_softmax(-1))
    flat = logits(2000, 6, 4, scale=1.2).log_softmax(-1)  # less certain: larger entropies
    for batch in torch.split(flat, 100):
        objective.begin(batch)
    assert objective.bet > 0.5  # a bet on large u
    assert float(objective._targets.mean()) < float(entropies(flat).mean()) - 0.05
    objective.fit(logits(4000, 6, 3).log_softmax(-1))
    assert objective.bet == 0.0


def test_the_bet_follows_its_formula() -> None:
    objective = EntropyMatch()
    source = logits(1000, 6, 3).log_softmax(-1)
    objective.fit(source)
    x = logits(50, 6, 5, scale=3.0).log_softmax(-1)
    objective.begin(x)
    ordered, bet, squares = np.sort(entropies(source).numpy()), 0.0, 0.0
    for entropy, target in zip(entropies(x).tolist(), objective._targets.tolist(), strict=True):
        u = float((ordered <= entropy).mean())
        # the distribution function of the density 1 + eps (v - 1/2), integrated from 0 to u
        grid = (np.arange(20_000) + 0.5) / 20_000 * u
        believed = float((1 + bet * (grid - 0.5)).mean() * u)
        assert target == pytest.approx(float(np.quantile(ordered, believed)), abs=1e-4)
        gradient = -(u - 0.5) / (1 + bet * (u - 0.5))
        squares += gradient**2
        bet = float(np.clip(bet - gradient / (8 * math.sqrt(3) * math.sqrt(squares)), -1.8, 1.8))
    assert objective.bet == pytest.approx(bet, rel=1e-12)


# Baselines


def test_plain_steps_are_torchs_own() -> None:
    task = Task(0)
    source, batches = task.draw(100)[0], [task.draw(32, shifted=True)[0] for _ in range(4)]
    zeros = torch.zeros(WIDTH, dtype=torch.float64)
    for name, optimizer_class in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)):
        adapter = GradientPrompt(task.model, zeros, 0.3, name, objective="entropy")
        adapter.fit_source(source)
        parameter = nn.Parameter(zeros.clone())
        optimizer = optimizer_class([parameter], lr=0.3)
        for batch in batches:
            adapter.adapt(batch)
            optimizer.zero_grad()
            probabilities = task.model(batch, parameter).softmax(-1)
            entropy: Tensor = -(probabilities * probabilities.log()).sum(-1).mean()
            entropy.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        torch.testing.assert_close(adapter.prompt, parameter.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("build", [Tent, EntropyMatching, GradientPrompt])
def test_baselines_leave_what_is_no_number(build: Callable[..., Adapter]) -> None:
    task = Task(0)
    adapter = build(task.model, torch.zeros(WIDTH, dtype=torch.float64))
    adapter.fit_source(task.draw(100)[0])
    batch = task.draw(32, shifted=True)[0]
    adapter.adapt(batch)
    before = adapter.prompt.clone()
    batch[0, 0] = math.nan
    assert not adapter.adapt(batch).accepted
    assert torch.equal(adapter.prompt, before)


def test_bad_arguments_are_named() -> None:
    model, prompt, _ = prompted("gains")
    with pytest.raises(ValueError, match="lr must be"):
        Tent(model, prompt, lr=0.0)
    with pytest.raises(ValueError, match='optimizer must be "sgd" or "adam", got \'rmsprop\''):
        EntropyMatching(model, prompt, optimizer="rmsprop")
    with pytest.raises(ValueError, match="momentum must be"):
        GradientPrompt(model, prompt, momentum=1.0)
