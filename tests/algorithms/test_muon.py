"""Muon: torch's two optimizers in one."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.algorithms.small_language_model import build_model, loss_of, markov_chain, sample, train
from torch import Tensor, nn

from piste_algorithms.optimizers import Muon


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_muon_and_adamw_bit_for_bit_under_a_schedule(nesterov: bool) -> None:
    model, reference = build_model(0), build_model(0)
    ours = Muon(Muon.default_param_groups(model), lr=1e-2, nesterov=nesterov)
    groups = Muon.default_param_groups(reference)
    muon = torch.optim.Muon(groups[0]["params"], lr=1e-2, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": group["params"], "weight_decay": group.get("weight_decay", 0.1)} for group in groups[1:]],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.8) for each in (ours, muon, adamw)]
    chain = markov_chain(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        tokens = sample(chain, 4, generator)
        for each in (model, reference):
            each.zero_grad()
            loss_of(each, tokens).backward()  # type: ignore[no-untyped-call]
        for optimizer in (ours, muon, adamw):
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        for left, right in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(left, right)


def test_resume_with_both_kinds_of_groups_is_bit_for_bit() -> None:
    chain = markov_chain(torch.Generator().manual_seed(0))
    model, other = build_model(0), build_model(1)
    optimizer = Muon(Muon.default_param_groups(model), lr=1e-2)
    resumed = Muon(Muon.default_param_groups(other), lr=1e-2)
    train(model, optimizer, chain, steps=3, seed=0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, chain, steps=3, seed=1)
    train(other, resumed, chain, steps=3, seed=1)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_state_of_a_matrix_is_one_momentum() -> None:
    parameter = nn.Parameter(normal(6, 4, seed=0))
    parameter.grad = normal(6, 4, seed=1)
    optimizer = Muon([parameter])
    optimizer.step()
    assert {key: value.shape for key, value in optimizer.state[parameter].items()} == {
        "momentum_buffer": (6, 4)
    }


def test_a_convolution_goes_to_adamw_or_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 5))
    groups = Muon.default_param_groups(model)
    assert {name: group["use_muon"] for group in groups for name in group["param_names"]} == {
        "0.weight": False,
        "0.bias": False,
        "2.weight": True,
        "2.bias": False,
    }
    with pytest.raises(ValueError, match=r"two-dimensional .*, but parameter 0.weight is \(4, 3, 2, 2\)"):
        Muon([("0.weight", model.get_parameter("0.weight"))])


def test_groups_can_be_added_and_are_checked() -> None:
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="two-dimensional"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1
    bias = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [bias], "use_muon": False})
    bias.grad = torch.ones(2)
    optimizer.step()
    assert bool((bias < 1).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, r"lr must be a number in \[0, inf\), got -1.0"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"ns_steps": 0}, "ns_steps must be an integer from 1 to 99, got 0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.ones(2, 2))], **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"adamw_betas": (0.9, 1.5)}, "adamw_betas"), ({"adamw_eps": -1.0}, "adamw_eps")],
)
def test_adamw_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [nn.Parameter(torch.ones(2))], "use_muon": False}], **arguments)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = Muon(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="Muon does not support sparse gradients"):
        optimizer.step()
