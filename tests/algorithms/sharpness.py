"""What the tests of the sharpness-aware optimizers share: a small network, its data, gradients as written."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from piste_algorithms.optimizers import AESAM, ARSAM, SAM, LookSAM

Batch = tuple[Tensor, Tensor]
Build = Callable[..., Any]

# Every member of the family, so that each kind of step comes up within a few steps.
FAMILY: dict[str, Build] = {
    "sam": lambda base, **changes: SAM(base, **{"rho": 0.1, **changes}),
    "looksam": lambda base, **changes: LookSAM(base, **{"rho": 0.1, "k": 3, **changes}),
    "aesam": lambda base, **changes: AESAM(base, **{"rho": 0.1, "total_steps": 20, **changes}),
    "arsam": lambda base, **changes: ARSAM(base, **{"rho": 0.1, "window": 6, "frac_init": 0.4, **changes}),
}


def network(*extra: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """6 inputs, 12 hidden units, 4 classes; `extra` layers come after the first one."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), *extra, nn.Tanh(), nn.Linear(12, 4)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def batches(count: int, size: int = 16, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Inputs `(size, 6)` and labels `(size,)`, a quarter of them drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    drawn = []
    for _ in range(count):
        inputs = torch.randn(size, 6, generator=generator, dtype=torch.float64)
        labels = (inputs @ teacher).argmax(1)
        noise = torch.rand(size, generator=generator) < 0.25
        labels[noise] = torch.randint(4, (int(noise.sum()),), generator=generator)
        drawn.append((inputs.to(dtype), labels))
    return drawn


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def closure_of(optimizer: Optimizer, model: nn.Module, batch: Batch) -> Callable[[], Any]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(batch[0]), batch[1])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return closure


def spoiled(
    optimizer: Any, model: nn.Module, batch: Batch, spoil: Callable[[], None], call: int = 2
) -> Callable[[], Any]:
    """A closure that calls `spoil` at the end of its second (`call`-th) evaluation."""
    evaluate, calls = closure_of(optimizer, model, batch), []

    def closure() -> Any:
        loss = evaluate()
        calls.append(loss)
        if len(calls) == call:
            spoil()
        return loss

    return closure


def train(model: nn.Module, optimizer: Optimizer, data: Iterable[Batch]) -> list[bool]:
    """Step through the data; whether each step had a second pass, for optimizers that count them."""
    chosen = []
    for batch in data:
        before = getattr(optimizer, "sam_steps", 0)
        optimizer.step(closure_of(optimizer, model, batch))
        chosen.append(getattr(optimizer, "sam_steps", 0) > before)
    return chosen


def weights(model: nn.Module) -> Tensor:
    """All weights as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def set_weights(model: nn.Module, vector: Tensor) -> None:
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(vector[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()


def gradient_at(model: nn.Module, vector: Tensor, batch: Batch) -> Tensor:
    """The gradient of the loss as one vector, at weights given as one; the model's own are left alone."""
    kept = weights(model)
    set_weights(model, vector)
    found = torch.autograd.grad(cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))
    set_weights(model, kept)
    return torch.cat([gradient.flatten() for gradient in found])


class WrittenSGD:
    """SGD with momentum 0.9 and weight decay 1e-3 on one vector, as it is written."""

    def __init__(self, start: Tensor, lr: float = 0.1) -> None:
        self.vector = start.clone()
        self.lr = lr
        self.velocity = torch.zeros_like(start)

    def step(self, gradient: Tensor) -> None:
        self.velocity = 0.9 * self.velocity + gradient + 1e-3 * self.vector
        self.vector = self.vector - self.lr * self.velocity


def sam_gradient(model: nn.Module, vector: Tensor, batch: Batch, rho: float) -> tuple[Tensor, Tensor]:
    """`g` and `g_s` as Foret et al. write them."""
    gradient = gradient_at(model, vector, batch)
    norm = math.sqrt(float((gradient * gradient).sum()))
    return gradient, gradient_at(model, vector + rho * gradient / norm, batch)
