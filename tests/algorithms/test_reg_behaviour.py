"""REG beside AdamW and Muon on a small language model: the acceptance checks B4 to B6."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.algorithms.small_language_model import (
    build_model,
    consistency_with_adamw,
    evaluate,
    markov_chain,
    train,
)
from torch import Tensor, nn

import piste_algorithms.optimizers.reg as reg_module
from piste_algorithms.optimizers import REG, Muon


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for one another, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_updates_resemble_those_of_adamw() -> None:
    """B4, on the eight hidden matrices of the small language model, every 10th of 130 steps."""
    cosines = consistency_with_adamw(steps=130, seed=0, every=10)
    assert cosines["REG"] >= 0.95
    assert cosines["Muon"] <= 0.85
    assert cosines["momentum"] < cosines["REG"]


SEEDS = (0, 1, 2)


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    groups = REG.default_param_groups(model)
    for group in groups:
        group["use_reg"] = False
    return REG(groups, lr=lr)


def reg(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return REG(REG.default_param_groups(model), lr=lr)


def muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return Muon(Muon.default_param_groups(model), lr=lr)


def frobenius_only(matrices: Tensor, powers: Tensor, *options: Any, factor: float) -> None:
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    matrices.mul_(factor * 0.2 * math.sqrt(matrices[0].numel()) / norms)


@pytest.mark.slow
def test_from_scratch_as_good_as_adamw_and_better_than_without_balancing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """B6: three seeds, the best of three learning rates each, then three times the best."""

    def mean_loss(build: Callable[[nn.Module, float], torch.optim.Optimizer], lr: float) -> float:
        losses = []
        for seed in SEEDS:
            model, chain = build_model(seed), markov_chain(torch.Generator().manual_seed(seed))
            losses.append(train(model, build(model, lr), chain, steps=300, seed=seed))
        return sum(losses) / len(losses)

    rates = (3e-3, 1e-2, 3e-2)
    adamw_loss = min(mean_loss(adamw, lr) for lr in rates)
    reg_losses = {lr: mean_loss(reg, lr) for lr in rates}
    best = min(reg_losses, key=lambda lr: reg_losses[lr])
    hot = mean_loss(reg, 3 * best)
    with monkeypatch.context() as patched:
        patched.setattr(reg_module, "_racs_", frobenius_only)
        frobenius_loss = min(mean_loss(reg, lr) for lr in rates)
    print(f"AdamW {adamw_loss:.3f}, REG {reg_losses}, at {3 * best:g}: {hot:.3f}, NGD {frobenius_loss:.3f}")
    assert reg_losses[best] <= 1.04 * adamw_loss
    assert reg_losses[best] < frobenius_loss
    initial = evaluate(build_model(0), markov_chain(torch.Generator().manual_seed(0)))
    assert hot < initial


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-3, 3e-3])
def test_fine_tuning_stays_closer_to_adamw_than_muon_does(lr: float) -> None:
    """B5: three seeds, 60 steps on a chain of which half the rows have changed, after AdamW pre-training."""
    losses: dict[str, float] = {"adamw": 0.0, "reg": 0.0, "muon": 0.0}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        chain = markov_chain(generator)
        shifted = markov_chain(generator, shifted_from=chain)
        trained = build_model(seed)
        train(trained, adamw(trained, 1e-2), chain, steps=300, seed=seed)
        for build in (adamw, reg, muon):
            model = build_model(seed)
            model.load_state_dict(trained.state_dict())
            loss = train(model, build(model, lr), shifted, steps=60, seed=seed + 50)
            losses[build.__name__] += loss / len(SEEDS)
    print(f"lr {lr:g}: {losses}")
    assert losses["reg"] - losses["adamw"] <= losses["muon"] - losses["adamw"]
    assert losses["reg"] - losses["adamw"] <= 0.05
