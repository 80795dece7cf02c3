"""What a run draws at random: it depends on the seed and the place in the run alone.

So a resumed run goes on with the same draws, whatever happened before, and every worker draws the same.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def order_of(epoch: int, seed: int, examples: int) -> Tensor:
    """The order of the training examples in an epoch, counted from 0: a permutation `(examples,)`."""
    return torch.randperm(examples, generator=_generator(f"{seed}:epoch:{epoch}", "cpu"))


def generator_at(step: int, seed: int, device: torch.device) -> torch.Generator:
    """The generator of what is drawn for a step, counted from 1, on a device."""
    return _generator(f"{seed}:step:{step}", device)


def _generator(place: str, device: torch.device | str) -> torch.Generator:
    digest = hashlib.sha256(place.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8]) >> 1)
