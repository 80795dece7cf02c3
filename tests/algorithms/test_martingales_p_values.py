"""Test martingales over p-values: peers, closed forms, and a mean of one whatever came before."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from crepes.martingales import EpsilonBettingFunction
from crepes.martingales import SimpleJumper as CrepesJumper
from hypothesis import given, settings
from hypothesis import strategies as st
from online_cp.martingale import SimpleJumper as OnlineJumper
from online_cp.martingale import SimpleMixtureMartingale
from scipy import integrate, special
from tests.algorithms.score_laws import Array

from piste_algorithms.martingales import PluginMartingale, PowerMartingale, PowerMixture, SimpleJumper
from piste_algorithms.martingales.p_values import PValueMartingale

BUILDERS: dict[str, Callable[[], PValueMartingale]] = {
    "jumper": SimpleJumper,
    "power": lambda: PowerMartingale(0.4),
    "mixture": PowerMixture,
    "plugin": PluginMartingale,
}


def drawn(kind: str, n: int) -> Array:
    generator = np.random.default_rng(0)
    values = {"uniform": generator.random(n), "small": generator.beta(0.7, 1.0, n)}
    values["large then small"] = np.concatenate(
        [generator.beta(1.5, 1.0, n // 2), generator.beta(0.5, 1, n // 2)]
    )
    return values[kind]


KINDS = ["uniform", "small", "large then small"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_jumper_is_that_of_two_peers(kind: str) -> None:
    p_values = drawn(kind, 10_000)
    found = SimpleJumper().update_many(p_values)
    peer = OnlineJumper(J=0.01, E=[-1, 0, 1])  # type: ignore[no-untyped-call]
    for p in p_values.tolist():
        peer.update(p)
    np.testing.assert_allclose(found, peer.log_martingale_values[1:], atol=1e-9, rtol=0)
    # crepes keeps the wealth itself, so it is compared where that is in range.
    wealth = CrepesJumper(J=0.01, bf=EpsilonBettingFunction(E=[-1, 0, 1])).apply(p_values[:1000])
    np.testing.assert_allclose(found[:1000], np.log(wealth), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_power_mixture_is_that_of_a_peer(kind: str) -> None:
    p_values = drawn(kind, 2000)
    found = PowerMixture().update_many(p_values)
    peer = SimpleMixtureMartingale()  # type: ignore[no-untyped-call]
    for p in p_values.tolist():
        peer.update(p)
    np.testing.assert_allclose(found, peer.log_martingale_values[1:], atol=1e-8, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 50, 3000])
def test_the_power_mixture_is_the_integral_of_power_martingales(kind: str, n: int) -> None:
    p_values = drawn(kind, 6000)[:n]
    surprise = -float(np.log(p_values).sum())
    found = PowerMixture().update_many(p_values)[-1]
    incomplete = math.log(float(special.gammainc(n + 1, surprise))) + float(special.gammaln(n + 1))
    assert found == pytest.approx(surprise + incomplete - (n + 1) * math.log(surprise), abs=1e-10)
    if n <= 50:
        powers = [
            PowerMartingale(kappa).update_many(p_values)[-1] for kappa in (np.arange(4000) + 0.5) / 4000
        ]
        assert math.exp(found) == pytest.approx(float(np.exp(powers).mean()), rel=1e-5)


def test_the_power_mixture_far_from_uniform() -> None:
    # p-values of one: L = 0, and the integral of kappa^n is 1 / (n + 1).
    assert PowerMixture().update_many(np.ones(9))[-1] == pytest.approx(-math.log(10), abs=1e-15)
    # Very small p-values: the whole of the gamma function, e^L n! / L^(n + 1).
    n, surprise = 20, 20 * 700.0
    found = PowerMixture().update_many(np.full(n, math.exp(-700.0)))[-1]
    whole = surprise + math.lgamma(n + 1) - (n + 1) * math.log(surprise)
    assert found == pytest.approx(whole, abs=1e-9)


def test_the_plugin_is_the_dirichlet_mixture_of_histograms() -> None:
    p_values = drawn("small", 500)
    found = PluginMartingale(bins=8, prior=0.5).update_many(p_values)[-1]
    counts = np.bincount((p_values * 8).astype(int), minlength=8)
    # bins^n B(prior + counts) / B(prior), in any order of the p-values
    ratio = special.gammaln(counts + 0.5).sum() - 8 * special.gammaln(0.5)
    ratio += special.gammaln(4.0) - special.gammaln(504.0)
    assert found == pytest.approx(500 * math.log(8) + float(ratio), abs=1e-9)
    assert PluginMartingale(bins=4).update(1.0) == 0.0  # the last bin is closed


# Not the mixture: 1 / 700 of its mean lies below the smallest p-value that float64 has. It is tested as an
# integral.
@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"mixture"}))
@pytest.mark.parametrize("past", [[], [0.03], [0.9, 0.5, 0.01, 0.2], [0.001] * 12])
def test_a_fair_bet_keeps_its_mean(name: str, past: list[float]) -> None:
    martingale = BUILDERS[name]()
    martingale.update_many(past)
    state = martingale.state_dict()

    def growth(u: float) -> float:
        # p = u^4 takes the singularity at 0 away: dp = 4 u^3 du.
        martingale.load_state_dict(state)
        return math.exp(martingale.update(u**4) - state["log_wealth"]) * 4 * u**3

    kinks = [(k / 10) ** 0.25 for k in range(1, 10)]
    mean, _ = integrate.quad(growth, 0, 1, points=kinks, limit=200, epsabs=1e-11)
    assert mean == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("name", sorted(BUILDERS))
@settings(max_examples=20)
@given(cut=st.integers(0, 60))
def test_a_saved_state_continues_bit_for_bit(name: str, cut: int) -> None:
    p_values = drawn("small", 60)
    whole, before = BUILDERS[name](), BUILDERS[name]()
    expected = whole.update_many(p_values)
    found = before.update_many(p_values[:cut])
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    for state in (torch.load(file), json.loads(json.dumps(before.state_dict()))):
        after = BUILDERS[name]()
        after.load_state_dict(state)
        single = [after.update(p) for p in p_values[cut:].tolist()]
        assert [*found, *single] == expected.tolist()
        assert after.state_dict() == whole.state_dict()


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_what_is_no_p_value_is_refused(name: str, p: float) -> None:
    martingale = BUILDERS[name]()
    martingale.update(0.3)
    before = martingale.state_dict()
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\], got"):
        martingale.update(p)
    assert martingale.state_dict() == before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SimpleJumper(0.0), r"jump must be a number in \(0, 1\)"),
        (lambda: PowerMartingale(1.0), r"kappa must be a number in \(0, 1\)"),
        (lambda: PluginMartingale(bins=1), "bins must be an integer >= 2"),
        (lambda: PluginMartingale(prior=0.0), "prior must be"),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
