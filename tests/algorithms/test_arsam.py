"""ARSAM: against its pseudo-code written on one vector in float64; counts, resume, bad input."""

import io
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.algorithms.sharpness import (
    Batch,
    WrittenSGD,
    batches,
    closure_of,
    gradient_at,
    network,
    sam_gradient,
    sgd,
    train,
    weights,
)
from torch import Tensor, nn

from piste_algorithms.optimizers import ARSAM
from piste_algorithms.optimizers.arsam import block_variance, mean_relative_change


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The pseudo-code


def written_change(values: list[float]) -> float:
    ratios = [(values[i + 1] - values[i]) / values[i] for i in range(len(values) - 1) if values[i] >= 1e-12]
    return min(1.0, max(-1.0, sum(ratios) / len(ratios))) if ratios else 0.0


def written_variance(values: list[float], blocks: int) -> float:
    """Equal blocks of the sorted values, the longer ones first; the mean of their variances."""
    ordered, count = sorted(values), min(blocks, len(values))
    size, longer = divmod(len(values), count)
    variances, start = [], 0
    for index in range(count):
        block = ordered[start : start + size + (index < longer)]
        start += len(block)
        mean = sum(block) / len(block)
        variances.append(sum((value - mean) ** 2 for value in block) / len(block))
    return sum(variances) / count


class Written:
    """ARSAM's pseudo-code; all tensors are one vector, whose last `tail` entries the statistics are of.

    `first`, `least` and `most` are s, its lower and its upper bound, all in steps.
    """

    def __init__(
        self, start: Tensor, *, first: float, least: float, most: float, gamma: float, scaled: bool, tail: int
    ) -> None:
        self.base = WrittenSGD(start)
        self.window, self.blocks, self.alpha, self.rho = 10, 3, (0.5, 0.3), 0.1
        self.s, self.least, self.most = first, least, most
        self.gamma, self.scaled, self.tail = gamma, scaled, tail
        self.t, self.used, self.j = 0, 0, 0
        self.psf: Tensor | None = None
        self.norm_at_sample = 0.0
        self.p: list[float] = []
        self.r: list[float] = []
        self.v: list[float] = []

    def step(self, batch: Batch) -> bool:
        position = self.t % self.window
        if position == 0:
            if self.t > 0:
                growth = self.alpha[0] * written_change(self.r) + self.alpha[1] * written_change(self.v)
                self.s = min(max(self.s * (1 + growth), self.least), self.most)
            self.used = 0
        quota = int(self.s)
        uniform = random.Random(f"7 {self.t}").random()
        sample = (
            self.psf is None
            or (self.used < quota and uniform < self.s / self.window)
            or self.window - position <= quota - self.used
        )
        g = gradient_at(network(), self.base.vector, batch)
        if sample:
            g_s = sam_gradient(network(), self.base.vector, batch, self.rho)[1]
            self.psf, self.norm_at_sample, self.j = g_s - g, float(g.norm()), 0
            self.used += 1
            a, b = float(g[-self.tail :].norm()), float(self.psf[-self.tail :].norm())
            self.p = [*self.p, b][-self.window :]
            self.r = [*self.r, b / a][-self.window :]
            self.v = [*self.v, written_variance(self.p, self.blocks)][-self.window :]
            self.base.step(g_s)
        else:
            assert self.psf is not None
            self.j += 1
            c = self.gamma**self.j * (float(g.norm()) / self.norm_at_sample if self.scaled else 1.0)
            self.base.step(g + c * self.psf if self.j <= 6 else g)
        self.t += 1
        return sample


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"mode": "robust"}, {"gamma": 0.9, "scaled": True, "tail": 136, "least": 2.0, "first": 2.0}),
        (
            {"mode": "paper", "norm_tensors": 2},
            {"gamma": 0.7, "scaled": False, "tail": 52, "least": 1.0, "first": 1.0},
        ),
        (
            {"mode": "robust", "frac_init": 0.55, "frac_min": 0.33, "norm_tensors": 3},
            {"gamma": 0.9, "scaled": True, "tail": 64, "least": 3.3, "first": 5.5},
        ),
    ],
)
def test_equals_the_pseudo_code(settings: dict[str, Any], written: dict[str, Any]) -> None:
    """Weights, choices and s over six windows and a half; the tensors have 72, 12, 48 and 4 entries."""
    model = network()
    reference = Written(weights(model), most=8.0, **written)
    optimizer = ARSAM(
        sgd(model), rho=0.1, window=10, blocks=3, alpha=(0.5, 0.3), budget=1.0, seed=7, **settings
    )
    lengths = set()
    for batch in batches(65):
        sampled = reference.step(batch)
        assert train(model, optimizer, [batch]) == [sampled]
        assert optimizer.samples_per_window == pytest.approx(reference.s, rel=1e-6)
        torch.testing.assert_close(weights(model), reference.base.vector, rtol=0, atol=1e-10)
        lengths.add(reference.s)
    assert len(lengths) >= 3


def test_block_variance() -> None:
    values = np.random.default_rng(0).gamma(2.0, 1.0, 53).tolist()
    for count in (1, 4, 5, 12, 50, 53):
        for blocks in (1, 5, 10):
            expected = written_variance(values[:count], blocks)
            assert block_variance(values[:count], blocks) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert block_variance(values[::-1], 5) == pytest.approx(block_variance(values, 5), rel=1e-12)


def test_mean_relative_change() -> None:
    assert mean_relative_change([]) == mean_relative_change([3.0]) == 0.0
    assert mean_relative_change([2.0, 3.0, 1.5]) == pytest.approx((0.5 - 0.5) / 2)
    assert mean_relative_change([1.0, 9.0]) == 1.0
    assert mean_relative_change([0.0, 1.0, 1.5]) == 0.5  # nothing is relative to 0
    # Jensen: relative changes of noise have a positive mean, which is why s grows.
    noise = np.random.default_rng(0).lognormal(0.0, 0.3, 50).tolist()
    assert mean_relative_change(noise) > 0


# Counts


def test_no_second_pass_is_the_base_bit_for_bit() -> None:
    model, plain = network(), network()
    optimizer = ARSAM(sgd(model), frac_max=0.0, warmup_steps=3)
    assert not any(train(model, optimizer, batches(120)))
    train(plain, sgd(plain), batches(120))
    assert torch.equal(weights(model), weights(plain))
    assert (optimizer.steps, optimizer.gradient_evaluations, optimizer.sam_steps) == (120, 120, 0)
    assert optimizer.sam_fraction == optimizer.psf_norm == 0.0


def test_without_decay_factor_it_is_random_sam() -> None:
    """gamma = 0 reuses nothing: the base's own steps between those of SAM."""
    model = network()
    optimizer = ARSAM(sgd(model), rho=0.1, gamma=0.0, window=10)
    written = WrittenSGD(weights(model))
    for batch in batches(40):
        [sampled] = train(model, optimizer, [batch])
        gradients = sam_gradient(network(), written.vector, batch, 0.1)
        written.step(gradients[1] if sampled else gradients[0])
        torch.testing.assert_close(weights(model), written.vector, rtol=0, atol=1e-12)
    assert 0 < optimizer.sam_steps < 40


def test_robust_preset_costs_between_a_fifth_and_a_half_more() -> None:
    """A2, over 24 windows of the default length; the closure's calls are counted here."""
    model = network()
    optimizer = ARSAM(sgd(model, lr=0.05), rho=0.1)
    calls = 0

    def closure(batch: Batch) -> Any:
        nonlocal calls
        calls += 1
        return closure_of(optimizer, model, batch)()

    data = batches(60)
    for step in range(1200):
        optimizer.step(lambda batch=data[step % 60]: closure(batch))  # type: ignore[misc]
    assert calls == optimizer.gradient_evaluations == optimizer.steps + optimizer.sam_steps
    assert 1.20 <= calls / 1200 <= 1.50
    assert optimizer.sam_fraction == optimizer.sam_steps / 1200


@pytest.mark.parametrize("mode", ["paper", "robust"])
@pytest.mark.parametrize("warmup_steps", [0, 13])
def test_every_window_has_its_quota(mode: str, warmup_steps: int) -> None:
    """A2: all steps of the warm-up, then exactly int(s) a window, with s from 1 or 2 up to the bound."""
    model = network()
    optimizer = ARSAM(
        sgd(model),
        rho=0.1,
        mode=mode,
        window=10,
        alpha=(2.0, 2.0),
        frac_max=0.8,
        warmup_steps=warmup_steps,
        seed=3,
    )
    assert all(train(model, optimizer, batches(warmup_steps, seed=5)))
    quotas = []
    for index in range(14):
        data = batches(10, seed=index)
        chosen = train(model, optimizer, data[:1])  # opens the window
        quotas.append(int(optimizer.samples_per_window))
        chosen += train(model, optimizer, data[1:])
        assert sum(chosen) == quotas[-1]
    assert quotas[0] == {"paper": 1, "robust": 2}[mode]
    assert max(quotas) >= 4
    assert optimizer.sam_steps == warmup_steps + sum(quotas)


@pytest.mark.parametrize("window", [7, 49, 50])
def test_the_paper_begins_with_one_sample_a_window(window: int) -> None:
    """49 (1 / 49) is a rounding below 1 in floating point."""
    model = network()
    optimizer = ARSAM(sgd(model), mode="paper", window=window, alpha=(0.0, 0.0))
    for _ in range(3):
        assert sum(train(model, optimizer, batches(window))) == 1


def test_the_budget_bounds_the_next_window() -> None:
    """Half of the first windows' steps exceed a budget of 0.3; it never goes below frac_min."""
    for least, expected in ((0.1, 3.0), (0.4, 4.0)):
        model = network()
        optimizer = ARSAM(sgd(model), window=10, alpha=(0.0, 0.0), frac_init=0.5, frac_min=least, budget=0.3)
        lengths = []
        for _ in range(3):
            train(model, optimizer, batches(10))
            lengths.append(optimizer.samples_per_window)
        assert lengths == [5.0, expected, expected]


def test_places_depend_on_the_seed_alone() -> None:
    def places(seed: int, start: float) -> list[bool]:
        parameter = nn.Parameter(torch.full((2,), start))
        base = torch.optim.SGD([parameter], lr=0.01)
        optimizer = ARSAM(base, window=20, alpha=(0.0, 0.0), frac_init=0.3, seed=seed)
        chosen = []
        for _ in range(60):

            def closure() -> None:
                optimizer.zero_grad()
                (parameter**4).sum().backward()  # type: ignore[no-untyped-call]

            before = optimizer.sam_steps
            optimizer.step(closure)
            chosen.append(optimizer.sam_steps > before)
        return chosen

    assert places(0, 1.0) == places(0, 2.0)
    assert places(0, 1.0) != places(1, 1.0)
    # Random places, not the ends of a window: over 20 seeds its second half has about its share of six.
    assert 2.0 <= np.mean([sum(places(seed, 1.0)[30:40]) for seed in range(20)]) <= 4.0


# The statistics' tensors


def test_last_tensors_are_the_model_s_where_it_is_known() -> None:
    """Groups that put biases last must not decide which tensors are the last ones of the network."""
    found = []
    for give_model in (True, False):
        model = network()
        parameters = list(model.parameters())
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2]}]
        optimizer = ARSAM(
            torch.optim.SGD(groups, lr=0.1), mode="paper", norm_tensors=2, model=model if give_model else None
        )
        [batch] = batches(1)
        g, g_s = sam_gradient(network(), weights(model), batch, 0.05)
        optimizer.step(closure_of(optimizer, model, batch))
        found.append(optimizer.psf_norms[0])
    psf = g_s - g
    head = psf[84:]  # the last layer: 48 weights, 4 biases
    biases = torch.cat([psf[72:84], psf[132:]])
    assert found == pytest.approx([float(head.norm()), float(biases.norm())], rel=1e-9)
    assert optimizer.psf_norm == pytest.approx(float(psf.norm()), rel=1e-9)


# State


def test_resume_in_the_middle_of_a_window_is_bit_for_bit() -> None:
    """A6: thirty more steps after a load with torch's safe defaults, amid other uses of global generators."""
    data = batches(60)
    model, other = network(), network(seed=1)
    optimizer = ARSAM(sgd(model), rho=0.1, window=12, alpha=(1.0, 1.0), seed=5)
    train(model, optimizer, data[:30])
    assert optimizer.since_sample
    stored = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    chosen = train(model, optimizer, data[30:])

    random.seed(1)
    torch.manual_seed(1)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    other.load_state_dict(loaded["model"])
    resumed = ARSAM(sgd(other), rho=0.1, window=12, alpha=(1.0, 1.0))
    resumed.load_state_dict(loaded["optimizer"])
    assert train(other, resumed, data[30:]) == chosen
    assert torch.equal(weights(model), weights(other))
    for name in ("gradient_evaluations", "sam_fraction", "psf_norm", "psf_ratio", "samples_per_window"):
        assert getattr(resumed, name) == getattr(optimizer, name)


def test_state_is_one_psf_a_parameter_in_its_dtype() -> None:
    model = network(dtype=torch.float32)
    optimizer = ARSAM(torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, optimizer, batches(5, dtype=torch.float32))
    held = [value for state in optimizer.state.values() for value in state.values()]
    assert [value.shape for value in held] == [parameter.shape for parameter in model.parameters()]
    assert all(value.dtype == torch.float32 for value in held)
    # A load casts it, as other state, to where the parameters are.
    wide = network(dtype=torch.float64)
    moved = ARSAM(torch.optim.SGD(wide.parameters(), lr=0.1))
    moved.load_state_dict(optimizer.state_dict())
    assert all(value.dtype == torch.float64 for state in moved.state.values() for value in state.values())


def test_nothing_that_is_not_finite_is_kept() -> None:
    """Every fourth second pass fails: PSF, its norms and the rings stay finite, and no window is stuck."""
    model, data = network(), batches(80)
    optimizer = ARSAM(sgd(model, lr=0.02), rho=0.1, window=8, frac_init=0.5)
    for batch in data:
        evaluate, calls = closure_of(optimizer, model, batch), 0

        def closure(evaluate: Any = evaluate) -> Any:
            nonlocal calls
            calls += 1
            loss = evaluate()
            if calls == 2 and optimizer.sam_steps % 4 == 3:
                gradient = model.get_parameter("2.weight").grad
                assert gradient is not None
                gradient[0, 0] = math.nan
            return loss

        optimizer.step(closure)
        assert optimizer.gradient_evaluations == optimizer.steps + optimizer.sam_steps
    assert optimizer.sam_steps >= 20
    kept = [*optimizer.psf_norms, *optimizer.psf_ratios, *optimizer.variances, optimizer.psf_norm]
    assert all(map(math.isfinite, kept))
    assert all(bool(value.isfinite().all()) for s in optimizer.state.values() for value in s.values())
    assert weights(model).isfinite().all()


def test_a_group_that_joins_has_no_psf_until_the_next_sample() -> None:
    model = network()
    first, second = model[0], model[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    optimizer = ARSAM(torch.optim.SGD(first.parameters(), lr=0.1), window=4, frac_init=0.25, alpha=(0.0, 0.0))
    train(model, optimizer, batches(1))
    optimizer.add_param_group({"params": list(second.parameters())})
    before = second.weight.detach().clone()
    assert train(model, optimizer, batches(2)) == [False, False]
    assert not torch.equal(second.weight, before)
    assert "psf" not in optimizer.state[second.weight]
    train(model, optimizer, batches(5))  # to the end of the next window
    assert "psf" in optimizer.state[second.weight]


# Arguments


def test_defaults_of_the_modes() -> None:
    robust, paper = ARSAM(sgd(network())), ARSAM(sgd(network()), mode="paper")
    table = {
        "rho": (0.05, 0.05),
        "window": (50, 50),
        "blocks": (5, 5),
        "alpha": ((0.13, 0.13), (0.13, 0.13)),
        "frac_init": (0.2, 1 / 50),
        "frac_min": (0.2, 1 / 50),
        "frac_max": (0.8, 0.8),
        "budget": (0.45, 1.0),
        "gamma": (0.9, 0.7),
        "reuse_max": (6, 6),
        "reuse_scale": ("norm", "none"),
        "warmup_steps": (0, 0),
        "norm_tensors": (None, 10),
    }
    for name, expected in table.items():
        assert (getattr(robust, name), getattr(paper, name)) == expected
    # Defaults give way to a bound that is given.
    low = ARSAM(sgd(network()), frac_max=0.1)
    assert (low.frac_min, low.frac_init, low.frac_max) == (0.1, 0.1, 0.1)
    high = ARSAM(sgd(network()), frac_min=0.3)
    assert (high.frac_min, high.frac_init, high.frac_max) == (0.3, 0.3, 0.8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "mode must be one of 'paper', 'robust', got 'fast'"),
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"blocks": 0}, "blocks must be an integer >= 1, got 0"),
        ({"alpha": 0.13}, "alpha must be a pair of numbers"),
        ({"alpha": (0.13, -1)}, r"alpha\[1\] must be a number in \[0, inf\), got -1"),
        ({"frac_max": 1.5}, r"frac_max must be a number in \[0, 1\], got 1.5"),
        ({"frac_min": 0.9}, "frac_min <= frac_init <= frac_max must hold, got 0.9, 0.9, 0.8"),
        ({"frac_init": 0.1}, "frac_min <= frac_init <= frac_max must hold, got 0.2, 0.1, 0.8"),
        ({"frac_init": math.nan}, "frac_init must be a number"),
        ({"budget": -0.1}, r"budget must be a number in \[0, 1\], got -0.1"),
        ({"gamma": 1.1}, r"gamma must be a number in \[0, 1\], got 1.1"),
        ({"reuse_max": -1}, "reuse_max must be an integer >= 0, got -1"),
        ({"reuse_scale": "cosine"}, "reuse_scale must be one of 'none', 'norm', got 'cosine'"),
        ({"warmup_steps": 1.5}, "warmup_steps must be an integer >= 0, got 1.5"),
        ({"norm_tensors": 0}, "norm_tensors must be an integer >= 1, got 0"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ARSAM(sgd(network()), **arguments)
