"""ARSAM that notes, in a file of its rank, what it has decided and where it stands after every step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from piste_algorithms.optimizers import ARSAM


class RecordedARSAM(ARSAM):
    """As ARSAM; `records` is a folder."""

    def __init__(
        self, base: Optimizer, records: str, window: int = 50, model: nn.Module | None = None
    ) -> None:
        super().__init__(base, window=window, model=model)
        self.records = Path(records)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; adds a line: its number, second passes so far, a digest of all weights."""
        loss = super().step(closure)
        digest = hashlib.sha256()
        for group in self.param_groups:
            for parameter in group["params"]:
                digest.update(parameter.detach().numpy().tobytes())
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        with (self.records / f"rank-{rank}.txt").open("a") as file:
            file.write(f"{self.steps} {self.sam_steps} {digest.hexdigest()}\n")
        return loss
