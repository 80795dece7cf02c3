"""The score of inputs: against scipy, frozen, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn

from piste_algorithms.martingales import FisherScore


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(12, 4)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = 0.6 * torch.randn(parameter.shape, generator=generator)
        self.double()

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_a_divergence_and_a_distance() -> None:
    model, reference, x = Classifier().eval(), normal(200, 1), normal(7, 2)
    found = FisherScore(model, reference, alpha=0.3)(x)
    with torch.no_grad():
        source = special.softmax(model(reference).numpy(), axis=1).mean(axis=0)
        probabilities = special.softmax(model(x).numpy(), axis=1)
        features = [model.features(inputs).numpy() for inputs in (reference, x)]
    spread = features[0].std(axis=0, ddof=1)
    alive = spread > 1e-3 * spread.mean()
    assert alive.all()
    distance = (((features[1] - features[0].mean(axis=0)) / spread) ** 2).mean(axis=1)
    expected = [stats.entropy(p, source) for p in probabilities] + 0.3 * distance
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert found.dtype == torch.float64


def test_a_shift_raises_it() -> None:
    score = FisherScore(Classifier(), normal(200, 1))
    assert score(normal(500, 2) + 1.0).mean() > score(normal(500, 3)).mean() + 0.5


def test_the_source_is_frozen() -> None:
    model, x = Classifier().train(), normal(5, 2)
    score = FisherScore(model, normal(100, 1))
    before = score(x)
    assert torch.equal(score(x), before)  # no dropout
    assert model.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    assert torch.equal(score(x), before)


def test_a_function_is_measured_by_its_logits() -> None:
    weights = normal(4, 5).T
    reference, x = normal(100, 1), normal(6, 2)
    found = FisherScore(lambda inputs: inputs @ weights, reference)(x)
    logits = (reference @ weights).numpy()
    source = special.softmax(logits, axis=1).mean(axis=0)
    new = (x @ weights).numpy()
    distance = (((new - logits.mean(axis=0)) / logits.std(axis=0, ddof=1)) ** 2).mean(axis=1)
    expected = [stats.entropy(p, source) for p in special.softmax(new, axis=1)] + distance
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_a_still_feature_does_not_make_everything_infinitely_strange() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0], x[:, 1], (x[:, 2] - 1e3).relu()], 1)

    score = FisherScore(model, normal(100, 1))
    assert bool(torch.isfinite(score(normal(10, 2))).all())
    sharp = FisherScore(lambda x: 1e4 * x, normal(100, 1))  # probabilities of exactly 0
    assert bool(torch.isfinite(sharp(normal(10, 2))).all())


def test_inputs_that_are_no_numbers_have_no_finite_score() -> None:
    x = normal(3, 2)
    x[1, 0] = float("nan")
    assert torch.isfinite(FisherScore(Classifier(), normal(100, 1))(x)).tolist() == [True, False, True]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="alpha must be"):
        FisherScore(Classifier(), normal(10, 1), alpha=-1.0)
    with pytest.raises(ValueError, match="reference must be a tensor of at least two inputs"):
        FisherScore(Classifier(), normal(1, 1))
    with pytest.raises(ValueError, match="reference must give finite"):
        FisherScore(Classifier(), torch.full((4, 6), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="reference must give features that vary"):
        FisherScore(Classifier(), torch.zeros(4, 6, dtype=torch.float64))
