"""Stacked optimizers against those that they stack: step by step, with options of each trial's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piste_algorithms.optimizers import REG
from piste_algorithms.stacked import Stacked, stack, stack_key

STEPS = 25
Options = dict[str, Any]
Case = tuple[type[torch.optim.Optimizer], list[Options]]

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
CASES: dict[str, Case] = {
    "sgd": (SGD, [{"lr": 0.1}, {"lr": 0.02, "weight_decay": 0.3}, {}]),
    "sgd, momentum": (
        SGD,
        [
            {"lr": 0.1, "momentum": 0.9},
            {"lr": 0.05, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1},
            {"lr": 0.2, "momentum": 0.99, "dampening": 1.0},
        ],
    ),
    "sgd, nesterov": (
        SGD,
        [
            {"lr": 0.1, "momentum": 0.9, "nesterov": True},
            {"lr": 0.03, "momentum": 0.7, "nesterov": True, "weight_decay": 0.2},
        ],
    ),
    "adamw": (
        ADAMW,
        [
            {"lr": 0.1},
            {"lr": 0.01, "betas": [0.5, 0.9], "eps": 1e-3, "weight_decay": 0.0},
            {"lr": 0.3, "betas": (0.0, 0.99), "eps": 1e-12, "weight_decay": 0.5},
        ],
    ),
    "reg": (
        REG,
        [
            {"lr": 0.1},
            {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.0, "rms": 1.0},
            {"lr": 0.3, "momentum": 0.0, "eps": 0.2, "adamw_betas": [0.5, 0.9]},
            {"lr": 0.0, "eps": 0.0},
        ],
    ),
    "reg, other scaling": (
        REG,
        [
            {"lr": lr, "nesterov": False, "n_sweeps": 3, "order": "col_row", "p": 3, "rms": None, "eps": eps}
            for lr, eps in ((0.1, 1e-8), (0.02, 0.3))
        ],
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Network(nn.Module):
    """Parameters of one, two and four dimensions, and a head."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5, dtype=dtype)
        self.convolution = nn.Conv2d(2, 3, 2, dtype=dtype)
        self.head = nn.Linear(4, 2, dtype=dtype)


def groups_of(optimizer: type[torch.optim.Optimizer], model: nn.Module) -> list[Options]:
    if optimizer is REG:
        return REG.default_param_groups(model)
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) is wide] for wide in (True, False))
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def start(trials: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in Network(dtype).named_parameters()}
    return {n: torch.randn(trials, *s, generator=generator, dtype=dtype) for n, s in shapes.items()}


def gradients_at(parameters: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """Of no function, but smooth in the parameters, and different in every step and trial."""
    return {name: torch.sin(3 * p + step) + 0.3 * p for name, p in parameters.items()}


def make(case: Case, parameters: dict[str, Tensor]) -> Stacked:
    optimizer, options = case
    model = Network(next(iter(parameters.values())).dtype)
    return stack(optimizer, model, groups_of(optimizer, model), options, parameters)


def stacked_path(case: Case, dtype: torch.dtype, trials: Sequence[int]) -> list[dict[str, Tensor]]:
    parameters = {name: p[list(trials)] for name, p in start(len(case[1]), dtype).items()}
    optimizer = make((case[0], [case[1][trial] for trial in trials]), parameters)
    path = []
    for step in range(STEPS):
        optimizer.step(gradients_at(parameters, step))
        path.append({name: p.clone() for name, p in parameters.items()})
    return path


def single_path(case: Case, dtype: torch.dtype, trial: int) -> list[dict[str, Tensor]]:
    cls: Any
    cls, options = case
    model = Network(dtype)
    model.load_state_dict({name: p[trial] for name, p in start(len(options), dtype).items()})
    optimizer = cls(groups_of(cls, model), **options[trial])
    path = []
    for step in range(STEPS):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        for name, gradient in gradients_at(parameters, step).items():
            model.get_parameter(name).grad = gradient
        optimizer.step()
        path.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return path


@every_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_every_step_is_the_optimizers_own(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    trials = range(len(case[1]))
    path = stacked_path(case, dtype, trials)
    for trial in trials:
        for found, expected in zip(path, single_path(case, dtype, trial), strict=True):
            for name, value in expected.items():
                torch.testing.assert_close(found[name][trial], value, rtol=tolerance, atol=tolerance)


@every_case
def test_company_and_order_do_not_matter(case: Case) -> None:
    trials = list(range(len(case[1])))
    together = stacked_path(case, torch.float64, trials)[-1]
    backwards = stacked_path(case, torch.float64, trials[::-1])[-1]
    apart = [stacked_path(case, torch.float64, [trial])[-1] for trial in trials]
    for name, value in together.items():
        torch.testing.assert_close(backwards[name].flip(0), value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([each[name] for each in apart]), value, rtol=1e-12, atol=1e-12)


@every_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_a_trial_that_diverges_leaves_its_neighbours_alone(case: Case, bad: float) -> None:
    trials = len(case[1])
    tame, wild = start(trials, torch.float64), start(trials, torch.float64)
    optimizers = make(case, tame), make(case, wild)
    for step in range(STEPS):
        calm, torn = gradients_at(tame, step), gradients_at(wild, step)
        for gradient in torn.values():
            gradient[0] = bad
        optimizers[0].step(calm)
        optimizers[1].step(torn)
    for name, value in tame.items():
        torch.testing.assert_close(wild[name][1:], value[1:], rtol=1e-12, atol=1e-12)
        if bad != 1e200:
            assert not wild[name][0].isfinite().any()


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.Adam, {"lr": 0.1}),
        (torch.optim.Rprop, {}),
        (SGD, {"maximize": True}),
        (SGD, {"foreach": True}),
        (SGD, {"lr": -0.1}),
        (SGD, {"momentun": 0.9}),
        (SGD, {"params": []}),
        (SGD, {"nesterov": True}),
        (SGD, {"lr": "fast"}),
        (ADAMW, {"amsgrad": True}),
        (ADAMW, {"capturable": True}),
        (ADAMW, {"betas": [0.9, 1.0]}),
        (ADAMW, {"betas": [0.9]}),
        (ADAMW, {"betas": 0.9}),
        (ADAMW, {"eps": -1.0}),
        (REG, {"momentum": 1.0}),
        (REG, {"order": "diagonal"}),
        (REG, {"n_sweeps": 0}),
    ],
)
def test_what_cannot_be_stacked_has_no_key(optimizer: type[torch.optim.Optimizer], options: Options) -> None:
    assert stack_key(optimizer, options) is None


@every_case
def test_options_that_may_differ_share_a_key(case: Case) -> None:
    optimizer, options = case
    keys = {stack_key(optimizer, each) for each in options}
    assert len(keys) == 1
    assert None not in keys


@pytest.mark.parametrize(
    ("optimizer", "first", "second"),
    [
        (SGD, {"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}),
        (SGD, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
        (REG, {"p": 2}, {"p": 3}),
        (REG, {"n_sweeps": 1}, {"n_sweeps": 2}),
        (REG, {"rms": 0.2}, {"rms": None}),
        (REG, {"nesterov": True}, {"nesterov": False}),
        (REG, {"order": "row_col"}, {"order": "col_row"}),
    ],
)
def test_options_that_need_other_operations_do_not(
    optimizer: type[torch.optim.Optimizer], first: Options, second: Options
) -> None:
    keys = stack_key(optimizer, first), stack_key(optimizer, second)
    assert None not in keys
    assert keys[0] != keys[1]
    with pytest.raises(ValueError, match="must need the same operations"):
        make((optimizer, [first, second]), start(2, torch.float64))


def test_a_parameter_without_a_trial_axis_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"parameter inner.weight must be of shape \(2, ...\), got \(3, 5, 3\)"
    ):
        make((SGD, [{}, {}]), start(3, torch.float64))


def test_a_groups_own_options_stand_above_the_trials() -> None:
    model = Network(torch.float64)
    rest = [p for name, p in model.named_parameters() if name != "inner.weight"]
    groups: list[Options] = [{"params": [model.inner.weight], "lr": 0.5}, {"params": rest}]
    parameters = start(2, torch.float64)
    before = {name: p.clone() for name, p in parameters.items()}
    ones = {name: torch.ones_like(p) for name, p in parameters.items()}
    stack(SGD, model, groups, [{"lr": 0.1}, {"lr": 0.2}], parameters).step(ones)
    moved = {name: (before[name] - p).flatten(1)[:, 0].tolist() for name, p in parameters.items()}
    assert moved["inner.weight"] == pytest.approx([0.5, 0.5])
    assert moved["inner.bias"] == pytest.approx([0.1, 0.2])
