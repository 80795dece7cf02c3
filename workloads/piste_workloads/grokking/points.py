"""What a task gives: points to train on, to validate on, and to test, all drawn from the run's seed."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


class Points(NamedTuple):
    """Inputs `(points, inputs)` (tokens: `(points, tokens)`) and targets `(points,)`."""

    inputs: Tensor
    targets: Tensor


class Dataset(NamedTuple):
    """Three sets of points."""

    train: Points
    validation: Points
    test: Points


def seeded(seed: int, purpose: str) -> torch.Generator:
    """A generator for one purpose of a run, independent of those for others."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
