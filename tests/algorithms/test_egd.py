"""EGD: steps by hand, weight decay, the switch, the choice of matrices, wrapping, resume, bad input."""

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import scipy.linalg
import torch
from pytorch_optimizer.optimizer.grokfast import gradfilter_ema
from torch import Tensor, nn

from piste_algorithms.optimizers import EGD, SAM, GrokfastEMA


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def oracle(gradient: Tensor) -> Tensor:
    """The orthogonal polar factor of a gradient of full rank, `(out, ...)`."""
    factor = scipy.linalg.polar(gradient.reshape(len(gradient), -1).numpy())[0]
    return torch.from_numpy(factor).view(gradient.shape)


class Net(nn.Module):
    """Two layers and a convolution, in float64; `hidden` is what is whitened."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 4).double()
        self.kernel = nn.Parameter(normal(3, 2, 2, 2, seed=1))
        self.head = nn.Linear(4, 3).double()
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=20 + index))


Gradients = dict[str, Tensor]


def gradients(model: nn.Module, step: int) -> Gradients:
    return {
        name: normal(*parameter.shape, seed=1000 * step + index)
        for index, (name, parameter) in enumerate(model.named_parameters())
    }


def give(model: nn.Module, values: Gradients) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = values[name].clone()


def assert_same(left: nn.Module, right: nn.Module, tolerance: float = 0.0) -> None:
    for (name, a), (_, b) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        assert float((a - b).detach().abs().max()) <= tolerance, name


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.named_parameters(), **{"lr": 0.1, **options})


@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_with_weight_decay_by_hand(maximize: bool) -> None:
    """G = gradient + decay W, V <- 0.9 V + polar(G), W <- W - lr V; biases as SGD has them."""
    model = Net()
    optimizer = EGD(sgd(model, momentum=0.9, weight_decay=0.3, maximize=maximize))
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    velocities = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(4):
        given = gradients(model, step)
        give(model, given)
        optimizer.step()
        for name, weight in weights.items():
            gradient = (-given[name] if maximize else given[name]) + 0.3 * weight
            velocities[name] = 0.9 * velocities[name] + (oracle(gradient) if weight.ndim >= 2 else gradient)
            weights[name] = weight - 0.1 * velocities[name]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=0, atol=1e-11)


@pytest.mark.parametrize("folded", [False, True])
def test_adamw_by_hand(folded: bool) -> None:
    """Decay inside the whitened gradient for `hidden` where it is folded, decoupled for all else."""
    model = Net()
    optimizer = EGD(
        torch.optim.AdamW(model.named_parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.4),
        select="^hidden",
        fold_weight_decay=folded,
    )
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = copy.deepcopy(first)
    for step in range(1, 5):
        given = gradients(model, step)
        give(model, given)
        optimizer.step()
        for name, weight in weights.items():
            gradient = given[name]
            if name == "hidden.weight":
                gradient = oracle(gradient + (0.4 * weight if folded else 0.0))
            if name != "hidden.weight" or not folded:
                weight = weight * (1 - 0.01 * 0.4)
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            corrected = (second[name] / (1 - 0.9**step)).sqrt() + 1e-6
            weights[name] = weight - 0.01 * first[name] / (1 - 0.8**step) / corrected
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=0, atol=1e-11)


@pytest.mark.parametrize("fused", [False, True])
def test_convolutions_are_flattened_whatever_their_layout(fused: bool) -> None:
    start, gradient = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    expected = start - 0.1 * oracle(gradient)
    for layout in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(start.clone(memory_format=layout))
        parameter.grad = gradient.to(memory_format=layout)
        EGD(torch.optim.SGD([parameter], lr=0.1, fused=fused)).step()
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-13)


def test_off_is_the_base_and_on_again_is_not() -> None:
    """Alg. 1: one way, above the threshold alone; then the base goes on, with its own weight decay."""
    model, plain = Net(), Net()
    optimizer = EGD(sgd(model, momentum=0.9, weight_decay=0.1), switch_threshold=0.9)
    base = sgd(plain, momentum=0.9, weight_decay=0.1)
    optimizer.notify(0.9)
    assert optimizer.enabled
    optimizer.notify(0.91)
    optimizer.notify(0.2)
    assert not optimizer.enabled
    for step in range(3):
        give(model, gradients(model, step))
        give(plain, gradients(plain, step))
        optimizer.step()
        base.step()
        assert_same(model, plain)
    optimizer.reenable()
    give(model, gradients(model, 9))
    before = model.hidden.weight.detach().clone()
    velocity = optimizer.base.state[model.hidden.weight]["momentum_buffer"].clone()
    optimizer.step()
    given = gradients(model, 9)["hidden.weight"] + 0.1 * before
    expected = before - 0.1 * (0.9 * velocity + oracle(given))
    torch.testing.assert_close(model.hidden.weight.detach(), expected, rtol=0, atol=1e-12)
    optimizer.notify(1.0)
    assert not optimizer.enabled


def test_a_threshold_of_one_is_never_exceeded() -> None:
    optimizer = EGD(sgd(Net()), switch_threshold=1)
    optimizer.notify(1.0)
    assert optimizer.enabled


@pytest.mark.parametrize("accuracy", [97.0, -0.1, math.nan, "high", True])
def test_accuracy_is_a_fraction(accuracy: Any) -> None:
    optimizer = EGD(sgd(Net()))
    with pytest.raises(ValueError, match=r"accuracy must be a number in \[0, 1\], got"):
        optimizer.notify(accuracy)
    assert optimizer.enabled


def whitened(optimizer: EGD, model: nn.Module) -> set[str]:
    """The parameters whose step differs from that of plain SGD."""
    plain = copy.deepcopy(model)
    give(model, gradients(model, 0))
    give(plain, gradients(plain, 0))
    optimizer.step()
    sgd(plain).step()
    pairs = zip(model.named_parameters(), plain.parameters(), strict=True)
    return {name for (name, ours), theirs in pairs if not torch.equal(ours, theirs)}


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (None, {"hidden.weight", "kernel", "head.weight"}),
        ("^hidden", {"hidden.weight"}),
        ("weight", {"hidden.weight", "head.weight"}),
        (lambda name, parameter: parameter.ndim == 4, {"kernel"}),
        (lambda name, parameter: name in ("head.weight", "head.bias"), {"head.weight"}),
    ],
)
def test_select(select: Any, expected: set[str]) -> None:
    model = Net()
    assert whitened(EGD(sgd(model), select=select), model) == expected


def test_select_counts_parameters_over_groups_where_they_have_no_names() -> None:
    model = Net()
    asked: list[str | int] = []

    def select(name: str | int, parameter: Tensor) -> bool:
        asked.append(name)
        return name == 3

    parameters = list(model.parameters())
    base = torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1)
    assert [name for name, _ in model.named_parameters()][3] == "head.weight"
    assert whitened(EGD(base, select=select), model) == {"head.weight"}
    assert asked == [0, 1, 3] or asked == [0, 2, 3]


def test_a_group_that_is_added_is_asked_about() -> None:
    model = Net()
    base = torch.optim.SGD([("hidden.weight", model.hidden.weight)], lr=0.1)
    optimizer = EGD(base, select="weight")
    optimizer.add_param_group(
        {"params": [("head.weight", model.head.weight), ("head.bias", model.head.bias)]}
    )
    base.add_param_group({"params": [("kernel", model.kernel)]})
    plain = copy.deepcopy(model)
    give(model, gradients(model, 0))
    optimizer.step()
    given = gradients(model, 0)
    for name, move in {
        "hidden.weight": oracle(given["hidden.weight"]),
        "head.weight": oracle(given["head.weight"]),
        "head.bias": given["head.bias"],
        "kernel": given["kernel"],
        "hidden.bias": torch.zeros(4).double(),
    }.items():
        expected = plain.get_parameter(name).detach() - 0.1 * move
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_leaves_groups_and_gradients_as_they_were(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    base = sgd(model, weight_decay=0.1)
    optimizer = EGD(base, select="^hidden")
    give(model, gradients(model, 0))
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    group = base.param_groups[0]
    before = {key: list(value) if isinstance(value, list) else value for key, value in group.items()}
    lists = group["params"], group["param_names"]
    seen: list[list[tuple[list[str], float]]] = []

    def stepped(*_: Any) -> None:
        seen.append([(each["param_names"], each["weight_decay"]) for each in base.param_groups])
        if fails:
            raise RuntimeError("out of memory")

    base.register_step_post_hook(stepped)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    else:
        optimizer.step()
    others = ["kernel", "hidden.bias", "head.weight", "head.bias"]
    assert [(sorted(names), decay) for names, decay in seen[0]] == [
        (["hidden.weight"], 0.0),
        (sorted(others), 0.1),
    ]
    assert optimizer.param_groups is base.param_groups
    assert len(base.param_groups) == 1
    assert base.param_groups[0] is group
    assert group["params"] is lists[0]
    assert group["param_names"] is lists[1]
    assert all(torch.equal(a, b) for a, b in zip(group.pop("params"), before.pop("params"), strict=True))
    assert group == before
    for parameter, gradient in held:
        assert parameter.grad is gradient
    fresh = gradients(model, 0)
    assert all(torch.equal(fresh[name], p.grad) for name, p in model.named_parameters() if p.grad is not None)


def test_a_scheduler_of_either_is_followed() -> None:
    for of_base in (True, False):
        model = Net()
        optimizer = EGD(sgd(model, weight_decay=0.1))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base if of_base else optimizer, 1, 0.5)
        give(model, gradients(model, 0))
        optimizer.step()
        scheduler.step()
        before = model.hidden.weight.detach().clone()
        optimizer.step()
        move = (model.hidden.weight.detach() - before).norm()
        assert float(move) == pytest.approx(0.05 * math.sqrt(4))  # lr times the root of the rank


def test_zero_and_non_finite_gradients_are_counted() -> None:
    model = Net()
    optimizer = EGD(sgd(model))
    given = gradients(model, 0)
    given["hidden.weight"].zero_()
    given["head.weight"][1, 1] = math.nan
    before = model.hidden.weight.detach().clone()
    for _ in range(3):
        give(model, given)
        optimizer.step()
    assert optimizer.skipped == 6
    assert torch.equal(model.hidden.weight, before)
    assert bool(model.kernel.isfinite().all())
    assert int(model.head.weight.isnan().sum()) == 1  # as under plain SGD: the caller sees what happened


def test_the_closure_is_called_once_and_decides_the_gradients() -> None:
    model, other = Net(), Net()
    optimizer, reference = EGD(sgd(model)), EGD(sgd(other))
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        give(model, gradients(model, 1))
        return 1.5

    with torch.no_grad():
        assert optimizer.step(closure) == 1.5
    assert calls == [True]
    give(other, gradients(other, 1))
    reference.step()
    assert_same(model, other)


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.2),
        lambda groups: torch.optim.Adam(groups, lr=0.1, weight_decay=0.2),
    ],
)
def test_whitened_gradients_go_through_grokfast(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """The published order: whiten (with the decay), filter, step. The filter is an independent one."""
    model, other = Net(), Net()
    optimizer = EGD(GrokfastEMA(make(model.named_parameters()), alpha=0.9, lamb=1.5))
    matrices = [parameter for parameter in other.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in other.parameters() if parameter.ndim < 2]
    base = make([{"params": matrices, "weight_decay": 0.0}, {"params": vectors}])
    averages: dict[str, Tensor] | None = None
    for step in range(5):
        given = gradients(model, step)
        give(model, given)
        optimizer.step()
        for name, parameter in other.named_parameters():
            matrix = parameter.ndim >= 2
            parameter.grad = oracle(given[name] + 0.2 * parameter.detach()) if matrix else given[name].clone()
        averages = gradfilter_ema(other, averages, alpha=0.9, lamb=1.5)
        base.step()
        assert_same(model, other, 1e-11)


def test_resume_with_rsvd_is_bit_for_bit() -> None:
    """Each step has a test matrix of its own, also after a resume; so is the switch kept."""

    def build() -> tuple[Net, EGD]:
        model = Net()
        return model, EGD(GrokfastEMA(sgd(model, momentum=0.9, weight_decay=0.1)), "rsvd", rank=2)

    def run(model: nn.Module, optimizer: EGD, steps: range) -> None:
        for step in steps:
            give(model, gradients(model, step))
            optimizer.step()

    (model, optimizer), (other, resumed) = build(), build()
    run(model, optimizer, range(4))
    optimizer.skipped = 3
    other.load_state_dict(model.state_dict())
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    third_model, third = pickle.loads(pickle.dumps((model, optimizer)))
    for net, stepper in ((model, optimizer), (other, resumed), (third_model, third)):
        run(net, stepper, range(4, 8))
        assert stepper.skipped == 3
        assert_same(model, net)
    optimizer.notify(1.0)
    resumed.load_state_dict(optimizer.state_dict())
    assert not resumed.enabled


def test_steps_differ_in_their_test_matrices() -> None:
    model = Net()
    optimizer = EGD(sgd(model), "rsvd", rank=1)
    moves = []
    for _ in range(2):
        before = model.hidden.weight.detach().clone()
        give(model, gradients(model, 0))
        optimizer.step()
        moves.append(model.hidden.weight.detach() - before)
    assert not torch.equal(*moves)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = EGD(sgd(embedding))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="EGD does not support sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "qr"}, "method must be one of"),
        ({"method": "rsvd", "rank": 0}, "rank must be"),
        ({"rcond": 2.0}, "rcond must be"),
        (
            {"select": "^hiden"},
            "EGD needs a parameter of two or more dimensions to whiten, .*'\\^hiden' matches none",
        ),
        ({"select": "bias"}, "'bias' matches none"),
        ({"select": lambda name, parameter: False}, "matches none"),
        ({"select": "("}, r"select '\(' is no regular expression"),
        ({"select": 3}, "select must be a regular expression, a function or None, got 3"),
        ({"switch_threshold": 95.0}, r"switch_threshold must be a number in \[0, 1\], got 95.0"),
        ({"switch_threshold": None}, "switch_threshold must be"),
    ],
)
def test_optimizer_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EGD(sgd(Net()), **arguments)


def test_a_base_without_matrices_or_names_is_refused() -> None:
    with pytest.raises(ValueError, match="whiten, but the base has none"):
        EGD(sgd(nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="searched in names, but the base's parameters have none"):
        EGD(torch.optim.SGD(Net().parameters(), lr=0.1), select="hidden")
    with pytest.raises(ValueError, match="base must be a built torch optimizer"):
        EGD(list(Net().parameters()))  # type: ignore[arg-type]


def test_a_base_that_calls_a_closure_itself_is_refused() -> None:
    matrix = nn.Parameter(torch.ones(2, 3))
    for base in (SAM(torch.optim.SGD([matrix], lr=0.1)), torch.optim.LBFGS([matrix])):
        with pytest.raises(ValueError, match=f"without a closure, but {type(base).__name__} needs one"):
            EGD(base)
