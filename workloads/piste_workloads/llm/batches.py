"""Which windows of the text are seen at which step: it depends on the seed and the step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def global_batch(seed: int, step: int, size: int, starts: int) -> list[int]:
    """The first positions of one step's windows, over all workers.

    The same whatever the number of workers, so that their mean gradient is the same up to rounding, and
    whatever happened before, so that a resumed run goes on with the same data.

    Args:
        seed: The run's seed.
        step: The step, counted from 1.
        size: How many windows.
        starts: How many first positions there are to choose from, uniformly and independently.
    """
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    drawn: list[int] = torch.randint(starts, (size,), generator=generator).tolist()
    return drawn


def validation_starts(tokens: int, context: int, windows: int) -> list[int]:
    """The first positions of at most `windows` windows that share no target, evenly over the text."""
    available = (tokens - 1) // context
    chosen = min(windows, available)
    return [index * available // chosen * context for index in range(chosen)]


def windows(
    tokens: NDArray[np.unsignedinteger], starts: Sequence[int], context: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, `(len(starts), context)` each; a target is the token after its input."""
    positions = np.asarray(starts)[:, None] + np.arange(context + 1)
    block = torch.from_numpy(tokens[positions].astype(np.int64)).to(device)
    return block[:, :-1], block[:, 1:]
