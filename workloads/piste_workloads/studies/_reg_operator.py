"""What REG's operator does to matrices, measured: closeness to AdamW, cost, conditioning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _zeropower_via_newtonschulz

from piste.running import load_recipe
from piste_algorithms.optimizers import REG, Muon, matrix_param_groups, racs
from piste_workloads.llm.batches import global_batch, windows
from piste_workloads.llm.config import Config
from piste_workloads.llm.model import GPT, cross_entropy
from piste_workloads.llm.tokens import open_corpus


def cosines(
    recipe: str, seeds: int, steps: int, every: int, overrides: dict[str, Any]
) -> dict[str, list[float]]:
    """The mean cosine between AdamW's update and other uses of the same first moment, one a seed.

    The population is the hidden matrices of the recipe's language model at every `every`-th of AdamW's steps
    with `lr = 3e-3`; weight decay is left out. `"own"` is REG's whole update, with its own Nesterov momentum
    of the same gradients.
    """
    found: dict[str, list[float]] = {"racs": [], "muon": [], "momentum": [], "own": []}
    with one_thread():
        for seed in range(seeds):
            config = load_recipe(recipe, {"seed": seed, **overrides})
            assert isinstance(config, Config)
            corpus = open_corpus(config)
            torch.manual_seed(seed)
            model = GPT(config.model, corpus.tokenizer.vocab_size)
            groups = matrix_param_groups(model, flag="is_matrix")
            matrices = groups[0]["params"]
            optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
            averages = [torch.zeros_like(matrix) for matrix in matrices]
            sums = dict.fromkeys(found, 0.0)
            for step in range(1, steps + 1):
                starts = global_batch(
                    seed, step, config.train.batch, len(corpus.train) - config.model.context
                )
                inputs, targets = windows(corpus.train, starts, config.model.context, torch.device("cpu"))
                optimizer.zero_grad()
                cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                for matrix, average in zip(matrices, averages, strict=True):
                    assert matrix.grad is not None
                    average.lerp_(matrix.grad, 0.05)
                    if step % every == 0:
                        state = optimizer.state[matrix]
                        moment = state["exp_avg"]
                        reference = moment / (state["exp_avg_sq"].sqrt() + 1e-8)
                        candidates = {
                            "racs": racs(moment),
                            "muon": newton_schulz(moment),
                            "momentum": moment,
                            "own": racs(matrix.grad.lerp(average, 0.95)),
                        }
                        for name, update in candidates.items():
                            sums[name] += float(
                                functional.cosine_similarity(update.flatten(), reference.flatten(), dim=0)
                            )
            count = len(matrices) * (steps // every)
            for name, total in sums.items():
                found[name].append(total / count)
    return found


def newton_schulz(matrix: Tensor) -> Tensor:
    """Muon's operator, torch's own."""
    factor: Tensor = _zeropower_via_newtonschulz(matrix, (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5, EPS)
    return factor.to(matrix.dtype)


def operator_times(size: int, repeats: int) -> list[float]:
    """Seconds of `racs` over those of Newton-Schulz for one `(size, size)` matrix, one a repetition."""
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return _ratios(lambda: racs(matrix), lambda: newton_schulz(matrix), repeats)


def step_times(against: str, repeats: int) -> list[float]:
    """Seconds of REG's step over those of `adamw` (foreach) or `muon`, one a repetition.

    For three matrices of 512 x 2048 and three of 512 x 512, with gradients that stay.
    """
    generator = torch.Generator().manual_seed(0)

    def matrices() -> list[Tensor]:
        made = [torch.randn(512, n, generator=generator, requires_grad=True) for n in (2048, 512) * 3]
        for matrix in made:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        return made

    other: torch.optim.Optimizer = (
        torch.optim.AdamW(matrices(), foreach=True) if against == "adamw" else Muon(matrices())
    )
    return _ratios(REG(matrices()).step, other.step, repeats)


def _ratios(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of `first` over those of `second`, taken in turns on one thread, after a call of each."""
    found = []
    with one_thread():
        for _ in range(repeats + 1):
            began = time.perf_counter()
            first()
            between = time.perf_counter()
            second()
            found.append((between - began) / (time.perf_counter() - between))
    return found[1:]


def condition_ratios(seeds: int, matrices: int) -> list[float]:
    """The median condition number after one sweep over that before, one a seed.

    Of matrices `D1 A D2`, with `A` a Gaussian 64 x 96 matrix and diagonals `exp(1.5 N(0, 1))`.
    """
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(matrices, 64, 96, generator=generator, dtype=torch.float64)
        rows = torch.exp(1.5 * torch.randn(matrices, 64, 1, generator=generator, dtype=torch.float64))
        columns = torch.exp(1.5 * torch.randn(matrices, 1, 96, generator=generator, dtype=torch.float64))
        scaled = rows * gaussian * columns
        found.append(float(_condition(racs(scaled)).median() / _condition(scaled).median()))
    return found


def _condition(matrices: Tensor) -> Tensor:
    singular: Tensor = torch.linalg.svdvals(matrices)
    return singular[:, 0] / singular[:, -1]


@contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
