"""A frozen classifier of badly scaled features, and a shift that an additive prompt can undo."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from piste_algorithms.adaptation import AdditivePrompt

CLASSES, WIDTH = 8, 32


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh())
        self.head = nn.Linear(64, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


class Task:
    """Gaussian classes in features whose scales differ by a factor of 30, and a network trained on them.

    Args:
        seed: of everything.
        shift: length of the shift in units of the classes' spread.
    """

    def __init__(self, seed: int, shift: float = 3.0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.scales = torch.logspace(-0.75, 0.75, WIDTH, dtype=torch.float64)
        self.means = 1.0 * self._normal(CLASSES, WIDTH)
        direction = self._normal(WIDTH)
        self.shift = shift * direction / direction.norm() * self.scales
        network = Network().double()
        for parameter in network.parameters():
            fan = parameter.shape[-1] if parameter.ndim == 2 else 64
            parameter.data = self._normal(*parameter.shape) / fan**0.5
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(300):
            x, y = self.draw(128)
            optimizer.zero_grad()
            loss: Tensor = nn.functional.cross_entropy(network(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        self.network = network.requires_grad_(False)
        self.model = AdditivePrompt(network)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def draw(self, n: int, shifted: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs `(n, WIDTH)` and labels `(n,)`."""
        y = torch.randint(CLASSES, (n,), generator=self.generator)
        x = (self.means[y] + self._normal(n, WIDTH)) * self.scales
        return (x + self.shift if shifted else x), y

    def accuracy(self, logits: Tensor, y: Tensor) -> float:
        return float((logits.argmax(-1) == y).double().mean())
