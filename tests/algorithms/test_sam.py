"""SAM: equality with the peer and with the paper; and what the whole family shares: bad input, batch
normalisation, failures in the second pass, copies.
"""

import copy
import math
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.algorithms.sam_peer import difference_from_peer
from tests.algorithms.sharpness import (
    FAMILY,
    Batch,
    Build,
    WrittenSGD,
    batches,
    closure_of,
    gradient_at,
    network,
    sam_gradient,
    set_weights,
    sgd,
    spoiled,
    train,
    weights,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from piste_algorithms.optimizers import ARSAM, SAM, LookSAM

every_member = pytest.mark.parametrize("build", FAMILY.values(), ids=FAMILY)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Equality with the peer and with the paper


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("base", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
        (torch.optim.AdamW, {"lr": 0.03}),
    ],
)
def test_equals_the_peer(base: Any, options: dict[str, Any], adaptive: bool) -> None:
    """A1. The peer rounds the norm of the gradient to float32; without that the two are the same."""
    assert difference_from_peer(base, adaptive, exact_norm=True, **options) <= 1e-13


@pytest.mark.parametrize("adaptive", [False, True])
def test_equals_the_released_peer_up_to_its_float32_norm(adaptive: bool) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    assert difference_from_peer(torch.optim.SGD, adaptive, exact_norm=False, **options) <= 1e-7


def test_equals_the_paper() -> None:
    """Algorithm 1 of Foret et al., written on one vector."""
    model = network()
    written = WrittenSGD(weights(model))
    optimizer = SAM(sgd(model), rho=0.2)
    for batch in batches(50):
        written.step(sam_gradient(network(), written.vector, batch, 0.2)[1])
        optimizer.step(closure_of(optimizer, model, batch))
        torch.testing.assert_close(weights(model), written.vector, rtol=0, atol=1e-12)


def test_counts_and_loss() -> None:
    model = network()
    optimizer = SAM(sgd(model))
    [batch] = batches(1)
    before = cross_entropy(model(batch[0]), batch[1])
    assert optimizer.sam_fraction == 0.0
    assert optimizer.step(closure_of(optimizer, model, batch)) == before
    train(model, optimizer, batches(9))
    assert (optimizer.steps, optimizer.sam_steps, optimizer.gradient_evaluations) == (10, 10, 20)
    assert optimizer.sam_fraction == 1.0


def gradients_as_one(parameters: Iterable[Tensor]) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])


@every_member
def test_psf_is_curvature_times_gradient(build: Build) -> None:
    """A5: the measured PSF against rho H g / ||g||, the product by differentiating twice."""
    model, [batch] = network(), batches(1)
    optimizer = build(sgd(model), rho=1e-3)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(cross_entropy(model(batch[0]), batch[1]), parameters, create_graph=True)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    direction = (flat / flat.norm()).detach()
    products = torch.autograd.grad(flat @ direction, parameters)
    expected = 1e-3 * torch.cat([product.flatten() for product in products])

    measured: list[Tensor] = []
    optimizer.base.register_step_pre_hook(lambda *_: measured.append(gradients_as_one(parameters)))
    optimizer.step(closure_of(optimizer, model, batch))
    flat = flat.detach()
    psf = measured[0] - flat
    assert torch.cosine_similarity(psf, expected, dim=0) >= 0.999
    assert float(psf.norm() / expected.norm()) == pytest.approx(1, abs=0.02)
    assert optimizer.psf_norm == pytest.approx(float(psf.norm()), rel=1e-9)
    assert optimizer.psf_ratio == pytest.approx(float(psf.norm() / flat.norm()), rel=1e-9)


# Bad input


@every_member
@pytest.mark.parametrize("rho", [0, -0.1, math.nan, math.inf, "0.1"])
def test_rho_is_checked(build: Build, rho: Any) -> None:
    with pytest.raises(ValueError, match=r"rho must be a number in \(0, inf\)"):
        build(sgd(network()), rho=rho)


@every_member
def test_a_base_that_needs_a_closure_is_refused(build: Build) -> None:
    parameters = list(network().parameters())
    for base in (torch.optim.LBFGS(parameters), SAM(torch.optim.SGD(parameters, lr=0.1))):
        with pytest.raises(ValueError, match=f"base must step without a closure, but {type(base).__name__}"):
            build(base)


@every_member
def test_a_step_without_closure_changes_nothing(build: Build) -> None:
    model = network()
    optimizer = build(sgd(model))
    before = weights(model)
    with pytest.raises(RuntimeError, match=rf"{type(optimizer).__name__}\.step\(\) needs a closure"):
        optimizer.step()
    assert torch.equal(weights(model), before)
    assert optimizer.steps == 0


@every_member
def test_sparse_gradients_are_refused(build: Build) -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = build(torch.optim.SGD(embedding.parameters(), lr=0.1))
    before = embedding.weight.detach().clone()

    def closure() -> None:
        optimizer.zero_grad()
        embedding(torch.tensor([1])).sum().backward()

    with pytest.raises(RuntimeError, match=f"{type(optimizer).__name__} does not support sparse gradients"):
        optimizer.step(closure)
    assert torch.equal(embedding.weight, before)


# Normalisation layers


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


@every_member
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.BatchNorm1d(12),
        lambda: nn.BatchNorm1d(12, momentum=None),
        lambda: nn.Sequential(
            nn.Unflatten(1, (3, 4)), nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten()
        ),
    ],
)
def test_running_statistics_are_those_of_one_pass(build: Build, layer: Callable[[], nn.Module]) -> None:
    model = network(layer())
    optimizer = build(sgd(model), model=model)
    for batch in batches(12):
        once = copy.deepcopy(model)
        once(batch[0])
        optimizer.step(closure_of(optimizer, model, batch))
        for found, expected in zip(statistics(model), statistics(once), strict=True):
            assert torch.equal(found, expected)
    assert optimizer.sam_steps > 0


def test_running_statistics_move_twice_without_a_model() -> None:
    """What `model=` is for."""
    model, [batch] = network(nn.BatchNorm1d(12)), batches(1)
    once = copy.deepcopy(model)
    once(batch[0])
    optimizer = SAM(sgd(model))
    optimizer.step(closure_of(optimizer, model, batch))
    assert not torch.equal(statistics(model)[0], statistics(once)[0])
    assert statistics(model)[2] == 2 * statistics(once)[2]


def test_statistics_are_used_in_evaluation_mode() -> None:
    model = network(nn.BatchNorm1d(12))
    train(model, SAM(sgd(model), model=model), batches(5))
    model.eval()
    [batch] = batches(1, seed=5)
    before, found = statistics(model), weights(model)
    expected = sam_gradient(copy.deepcopy(model), found, batch, 0.1)[1]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=1.0), rho=0.1, model=model)
    optimizer.step(closure_of(optimizer, model, batch))
    torch.testing.assert_close(weights(model), found - expected, rtol=0, atol=1e-12)
    assert all(torch.equal(*pair) for pair in zip(before, statistics(model), strict=True))


# What goes wrong in the second pass


@every_member
def test_an_exception_in_the_second_pass_restores_the_weights(build: Build) -> None:
    model, data = network(nn.BatchNorm1d(12)), batches(8)
    optimizer = build(sgd(model), model=model)
    before = weights(model)
    once = copy.deepcopy(model)
    once(data[0][0])

    def interrupt() -> None:
        assert not torch.equal(weights(model), before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(spoiled(optimizer, model, data[0], interrupt))
    assert torch.equal(weights(model), before)
    assert all(torch.equal(*pair) for pair in zip(statistics(model), statistics(once), strict=True))
    assert (optimizer.steps, optimizer.sam_steps) == (0, 0)
    train(model, optimizer, data)
    assert weights(model).isfinite().all()


def set_gradient(model: nn.Sequential, value: float) -> Callable[[], None]:
    def spoil() -> None:
        for parameter in model[0].parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(value)

    return spoil


@every_member
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_second_gradient_that_is_not_finite_leaves_the_base_step(build: Build, value: float) -> None:
    model, plain, data = network(), network(), batches(8)
    optimizer, base = build(sgd(model)), sgd(plain)
    optimizer.step(spoiled(optimizer, model, data[0], set_gradient(model, value)))
    base.step(closure_of(base, plain, data[0]))
    assert torch.equal(weights(model), weights(plain))
    assert (optimizer.gradient_evaluations, optimizer.sam_steps) == (2, 1)
    assert optimizer.psf_norm == optimizer.psf_ratio == 0.0
    train(model, optimizer, data)
    assert weights(model).isfinite().all()


@every_member
def test_a_first_gradient_that_is_not_finite_is_the_base_alone(build: Build) -> None:
    model, data = network(), batches(8)
    optimizer = build(torch.optim.SGD(model.parameters(), lr=0.1))
    chosen = train(model, optimizer, data)
    kept = copy.deepcopy(optimizer.state_dict())
    good = weights(model)
    optimizer.step(spoiled(optimizer, model, data[0], set_gradient(model, math.nan), call=1))
    assert model.get_parameter("0.weight").isnan().all()  # as under torch's own optimizers
    assert model.get_parameter("2.weight").isfinite().all()
    assert optimizer.sam_steps == sum(chosen)
    after = optimizer.state_dict()
    for key, state in after["state"].items():
        for name, value in state.items():
            assert torch.equal(value, kept["state"][key][name])
    steps = {"steps", "gradient_evaluations", "earlier_samples"}
    assert {k: v for k, v in after["memory"].items() if k not in steps} == {
        k: v for k, v in kept["memory"].items() if k not in steps
    }
    set_weights(model, good)
    train(model, optimizer, data)
    assert weights(model).isfinite().all()


# Which parameters have a gradient


class Branches(nn.Module):
    """Three weights; the closure of a test says in which pass each of them counts."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.first, self.second = (
            nn.Parameter(torch.full((3,), value, dtype=torch.float64)) for value in (0.5, -0.4, 0.3)
        )

    def loss(self, *names: str) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name in names:
            total = total + (self.get_parameter(name) ** 4).sum()
        return total


@every_member
def test_a_parameter_that_counts_in_one_pass_alone(build: Build) -> None:
    """Only what has a gradient in the first pass climbs; only what has one in the second steps with it."""
    model = Branches()
    optimizer = build(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    passes: list[dict[str, Tensor]] = []

    def closure() -> None:
        optimizer.zero_grad()
        passes.append({name: value.detach().clone() for name, value in model.named_parameters()})
        model.loss("always", "second" if len(passes) == 2 else "first").backward()  # type: ignore[no-untyped-call]

    optimizer.step(closure)
    before, climbed = passes
    assert torch.equal(climbed["second"], before["second"])
    assert not torch.equal(climbed["first"], before["first"])
    assert torch.equal(model.first, before["first"])
    # d/dw sum w^4 = 4 w^3
    torch.testing.assert_close(model.second.detach(), before["second"] - 0.4 * before["second"] ** 3)
    torch.testing.assert_close(model.always.detach(), before["always"] - 0.4 * climbed["always"] ** 3)
    for _ in range(8):  # the reuse takes what there is
        optimizer.step(closure)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@every_member
def test_gradients_may_be_zeroed_in_place(build: Build) -> None:
    """As a closure with `set_to_none=False`, or a data-parallel bucket, does."""
    trained = []
    for set_to_none in (True, False):
        model = network()
        optimizer = build(sgd(model))
        for batch in batches(12):

            def closure(
                optimizer: Any = optimizer,
                model: nn.Module = model,
                batch: Batch = batch,
                set_to_none: bool = set_to_none,
            ) -> Tensor:
                optimizer.zero_grad(set_to_none)
                loss = cross_entropy(model(batch[0]), batch[1])
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            optimizer.step(closure)
        trained.append(weights(model))
    assert torch.equal(*trained)


# Copies, schedulers, generators


@every_member
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_under_a_scheduler_is_its_own(build: Build, copier: Callable[[Any], Any]) -> None:
    """torch's schedulers cover `step` of the instance; a copy must not step the original."""
    model, data = network(), batches(6)
    optimizer = build(sgd(model))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    train(model, optimizer, data)
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.09)
    copied_model, copied = copier((model, optimizer))
    before = weights(model)
    train(copied_model, copied, data)
    assert torch.equal(weights(model), before)
    train(model, optimizer, data)
    assert torch.equal(weights(model), weights(copied_model))


@every_member
def test_no_generator_but_its_own_is_touched(build: Build) -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), torch.get_rng_state().tolist(), repr(np.random.get_state())  # noqa: NPY002

    model = network()
    optimizer = build(sgd(model))
    before = states()
    train(model, optimizer, batches(30))
    assert states() == before


def test_one_second_pass_a_step_makes_the_family_one() -> None:
    """SAM at every step: k = 1, and a fraction of 1 in both modes."""
    trained = []
    for build in (
        lambda base: SAM(base, rho=0.1),
        lambda base: LookSAM(base, rho=0.1, k=1),
        lambda base: ARSAM(base, rho=0.1, frac_min=1.0, frac_max=1.0, window=7),
        lambda base: ARSAM(base, rho=0.1, frac_min=1.0, frac_max=1.0, window=7, mode="paper"),
        lambda base: ARSAM(base, rho=0.1, frac_min=0.0, frac_max=0.5, window=7, warmup_steps=50),
    ):
        model = network()
        assert all(train(model, build(sgd(model)), batches(50)))
        trained.append(weights(model))
    assert all(torch.equal(trained[0], other) for other in trained[1:])


def test_gradient_at_leaves_the_model_alone() -> None:
    """The reference itself: at the model's own weights it is what `backward` leaves."""
    model, [batch] = network(), batches(1)
    before = weights(model)
    found = gradient_at(model, before + 1.0, batch)
    assert torch.equal(weights(model), before)
    assert not torch.equal(found, gradient_at(model, before, batch))
    cross_entropy(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
    assert torch.equal(gradient_at(model, before, batch), gradients_as_one(model.parameters()))
