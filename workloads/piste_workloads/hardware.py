"""What a training loop asks of its device, and of what is wrapped around its model."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from piste.errors import BadInput


def precision(bf16: bool | Literal["auto"], device: torch.device) -> AbstractContextManager[Any]:
    """The autocast of the forward pass: bfloat16 where the recipe asks for it or the GPU has it.

    Raises:
        BadInput: The recipe asks for bfloat16 and the GPU lacks it.
    """
    cuda = device.type == "cuda"
    available = not cuda or torch.cuda.is_bf16_supported()
    if bf16 is True and not available:
        raise BadInput('train.bf16 = true: this GPU has no bfloat16: set it to false or "auto"')
    wanted = cuda and available if bf16 == "auto" else bf16
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()


def no_sync(network: nn.Module) -> AbstractContextManager[Any]:
    """DistributedDataParallel's own, where there is one: gradients stay with their worker meanwhile."""
    own: Callable[[], AbstractContextManager[Any]] = getattr(network, "no_sync", nullcontext)
    return own()


def now(device: torch.device) -> float:
    """Seconds, when everything asked of the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
