"""The battery that every optimizer of `piste_algorithms.optimizers` passes; a new file is tested at once.

What a class declares, and the battery reads (never a name):

- `test_settings`: the arguments to build it with. `"base": {"name": "sgd", "lr": 0.1}` is a torch optimizer
  that is built first and passed in place of the parameters, as in a recipe.
- `test_schedule`: `"constant"` (default) or `"linear"` decay of the learning rate to 0.
- `default_param_groups(model)`: makes its groups from a model; `model.parameters()` otherwise.
- `needs_closure` (False), `matrices_only` (False: takes any shape, maybe by `default_param_groups`).
- `isolates_parameters` (True): one parameter's non-finite gradient leaves the others finite.
- `test_exclusions` (none): names of problems of the catalogue that it does not converge on.
"""

import copy
import importlib
import inspect
import io
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.contracts.problems import PROBLEMS, Problem, Tensors
from torch import Tensor, nn
from torch.optim import Optimizer

import piste_algorithms.optimizers


@dataclass(frozen=True)
class Member:
    name: str
    cls: type[Optimizer]
    settings: dict[str, Any]
    schedule: str = "constant"

    def declared(self, capability: str, default: Any) -> Any:
        return getattr(self.cls, capability, default)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        make = self.declared("default_param_groups", None)
        return list(make(model)) if make is not None else [{"params": list(model.parameters())}]

    def build_on(self, groups: list[dict[str, Any]], **changes: Any) -> Optimizer:
        settings = {**self.settings, **changes}
        build: Any = self.cls
        if "base" not in settings:
            return build(groups, **settings)  # type: ignore[no-any-return]
        base = dict(settings.pop("base"))
        name = base.pop("name")
        classes: dict[str, Any] = {key.lower(): value for key, value in vars(torch.optim).items()}
        if "lr" in settings:
            base["lr"] = settings.pop("lr")
        return build(classes[name](groups, **base), **settings)  # type: ignore[no-any-return]

    def build(self, model: nn.Module, **changes: Any) -> Optimizer:
        return self.build_on(self.groups(model), **changes)


def discover() -> list[Member]:
    found = []
    for info in pkgutil.iter_modules(piste_algorithms.optimizers.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"piste_algorithms.optimizers.{info.name}")
        classes = [
            value
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, Optimizer) and value.__module__ == module.__name__
        ]
        assert len(classes) == 1, f"{module.__name__} must define one optimizer, it defines {classes}"
        cls = classes[0]
        assert hasattr(cls, "test_settings"), f"{cls.__name__} must declare test_settings"
        found.append(Member(info.name, cls, cls.test_settings, getattr(cls, "test_schedule", "constant")))
    return found


ADAMW = Member("torch.optim.AdamW", torch.optim.AdamW, {"lr": 0.2, "weight_decay": 0.0}, "linear")
MEMBERS = [*discover(), ADAMW]

every_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def two_matrices(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    return Tensors(
        first=torch.randn(4, 6, generator=generator).to(dtype),
        second=torch.randn(4, 6, generator=generator).to(dtype),
        third=torch.randn(3, 5, generator=generator).to(dtype),
    )


def squares(model: nn.Module) -> Tensor:
    """A loss that couples entries within a parameter but not parameters with one another."""
    total = torch.zeros(())
    for parameter in model.parameters():
        centred = parameter.float() - 0.3
        total = total + (centred**2).sum() + 0.1 * centred.sum() ** 2
    return total


def step(
    optimizer: Optimizer,
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor] = squares,
    spoil: Callable[[nn.Module], None] | None = None,
) -> Any:
    def closure() -> Any:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()  # type: ignore[no-untyped-call]
        if spoil is not None:
            spoil(model)
        return value

    return optimizer.step(closure)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for (name, a), (_, b) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def require_lr(optimizer: Optimizer) -> None:
    if any("lr" not in group for group in optimizer.param_groups):
        pytest.skip("has no learning rate")


def test_discovers_the_members() -> None:
    assert {"reg", "muon"} <= {member.name for member in MEMBERS}


@every_member
@every_problem
def test_converges(member: Member, problem: Problem) -> None:
    if member.declared("matrices_only", False) and not problem.matrices_only:
        pytest.skip("takes matrices only")
    if problem.name in member.declared("test_exclusions", ()):
        pytest.skip("declared not to converge here")
    model = problem.model()
    optimizer = member.build(model)
    rates: list[Any] = [group.get("lr") for group in optimizer.param_groups]
    for iteration in range(problem.steps):
        if member.schedule == "linear":
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - iteration / problem.steps)
        step(optimizer, model, problem.loss)
    excess = problem.loss(model).item() - problem.minimum
    assert -1e-9 <= excess <= problem.tolerance


@every_member
def test_state_dict_continues_bit_for_bit(member: Member) -> None:
    model = two_matrices()
    optimizer = member.build(model)
    for _ in range(7):
        step(optimizer, model)
    resumed_model = copy.deepcopy(model)
    resumed = member.build(resumed_model)
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    for _ in range(7):
        step(optimizer, model)
        step(resumed, resumed_model)
        assert_same(model, resumed_model)


@every_member
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_continue_bit_for_bit(member: Member, copier: Callable[[Any], Any]) -> None:
    model = two_matrices()
    optimizer = member.build(model)
    for _ in range(3):
        step(optimizer, model)
    copied_model, copied = copier((model, optimizer))
    before = snapshot(model)
    for _ in range(3):
        step(copied, copied_model)
    for name, parameter in model.named_parameters():  # the copy owns its own parameters
        assert torch.equal(parameter, before[name])
    for _ in range(3):
        step(optimizer, model)
    assert_same(model, copied_model)


@every_member
def test_same_seed_same_trajectory(member: Member) -> None:
    first, second = two_matrices(), two_matrices()
    optimizers = member.build(first), member.build(second)
    for _ in range(5):
        step(optimizers[0], first)
        step(optimizers[1], second)
    assert_same(first, second)
    assert not torch.equal(first.get_parameter("first"), two_matrices().get_parameter("first"))


@every_member
def test_zero_learning_rate_changes_nothing(member: Member) -> None:
    model = two_matrices()
    optimizer = member.build(model)
    require_lr(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = snapshot(model)
    for _ in range(3):
        step(optimizer, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@every_member
def test_changed_learning_rate_takes_effect(member: Member) -> None:
    model, slower = two_matrices(), two_matrices()
    optimizer, slow = member.build(model), member.build(slower)
    require_lr(optimizer)
    step(optimizer, model)
    step(slow, slower)
    for group in slow.param_groups:
        group["lr"] *= 0.1
    before = snapshot(model)
    step(optimizer, model)
    step(slow, slower)
    for name, parameter in model.named_parameters():
        move = (parameter - before[name]).norm()
        slow_move = (slower.get_parameter(name) - before[name]).norm()
        assert 0 < slow_move < 0.5 * move


@every_member
def test_parameters_without_gradient_are_left_alone(member: Member) -> None:
    model = two_matrices()
    optimizer = member.build(model)
    before = snapshot(model)

    def loss(model: nn.Module) -> Tensor:
        return (model.get_parameter("first") ** 2).sum()

    for _ in range(3):
        step(optimizer, model, loss)
    assert torch.equal(model.get_parameter("second"), before["second"])
    assert torch.equal(model.get_parameter("third"), before["third"])
    assert not torch.equal(model.get_parameter("first"), before["first"])


@every_member
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gradient_stays_in_its_parameter(member: Member, value: float) -> None:
    if not member.declared("isolates_parameters", True):
        pytest.skip("couples its parameters by design")
    model, clean = two_matrices(), two_matrices()
    optimizer, reference = member.build(model), member.build(clean)

    def spoil(model: nn.Module) -> None:
        gradient = model.get_parameter("first").grad
        assert gradient is not None
        gradient[0, 0] = value

    for _ in range(3):
        step(optimizer, model, spoil=spoil)
        step(reference, clean)
    for name in ("second", "third"):  # "second" has the shape of "first": it may share its batch
        torch.testing.assert_close(model.get_parameter(name), clean.get_parameter(name), rtol=1e-6, atol=1e-6)


@every_member
def test_groups_have_their_own_learning_rate(member: Member) -> None:
    model, reference = two_matrices(), two_matrices()
    separate = member.build_on(
        [{"params": [model.get_parameter("first")]}, {"params": [model.get_parameter("second")]}]
    )
    together = member.build_on([{"params": [reference.get_parameter("first")]}])
    require_lr(separate)
    separate.param_groups[1]["lr"] = 0.0
    before = snapshot(model)

    def loss(model: nn.Module) -> Tensor:
        return (model.get_parameter("first") ** 2).sum() + (model.get_parameter("second") ** 2).sum()

    for _ in range(3):
        step(separate, model, loss)
        step(together, reference, loss)
    assert torch.equal(model.get_parameter("second"), before["second"])
    assert not torch.equal(model.get_parameter("first"), before["first"])
    if member.declared("isolates_parameters", True):
        torch.testing.assert_close(model.get_parameter("first"), reference.get_parameter("first"))


@every_member
def test_a_group_can_be_added(member: Member) -> None:
    model = two_matrices()
    optimizer = member.build_on([{"params": [model.get_parameter("first")]}])
    step(optimizer, model)
    optimizer.add_param_group({"params": [model.get_parameter("third")]})
    before = snapshot(model)
    step(optimizer, model)
    assert not torch.equal(model.get_parameter("third"), before["third"])
    assert torch.equal(model.get_parameter("second"), before["second"])


@every_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_device_are_kept(member: Member, dtype: torch.dtype) -> None:
    model = two_matrices(dtype)
    optimizer = member.build(model)
    start = squares(model).item()
    for _ in range(3):
        step(optimizer, model)
    for parameter in model.parameters():
        assert parameter.dtype == dtype
        assert parameter.device.type == "cpu"
        assert bool(parameter.isfinite().all())
    assert squares(model).item() < start


@every_member
def test_closure_is_called_with_gradients_and_its_loss_returned(member: Member) -> None:
    model = two_matrices()
    optimizer = member.build(model)
    start = squares(model).item()
    enabled = []

    def loss(model: nn.Module) -> Tensor:
        enabled.append(torch.is_grad_enabled())
        return squares(model)

    with torch.no_grad():
        returned = step(optimizer, model, lambda model: _with_grad_check(loss, model))
    assert all(enabled)
    assert enabled
    assert float(returned.detach()) == pytest.approx(start)


def _with_grad_check(loss: Callable[[nn.Module], Tensor], model: nn.Module) -> Tensor:
    value = loss(model)
    assert value.requires_grad
    return value


@every_member
def test_step_without_closure(member: Member) -> None:
    model = two_matrices()
    optimizer = member.build(model)
    squares(model).backward()  # type: ignore[no-untyped-call]
    before = snapshot(model)
    if member.declared("needs_closure", False):
        with pytest.raises((ValueError, RuntimeError), match="closure"):
            optimizer.step()
        assert torch.equal(model.get_parameter("first"), before["first"])
    else:
        bare: Any = optimizer.step
        assert bare() is None
        assert not torch.equal(model.get_parameter("first"), before["first"])
