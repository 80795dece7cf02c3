"""What one of two data-parallel processes does: EGD on its half of each batch."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from piste_algorithms.optimizers import EGD

METHODS = ("eigh", "rsvd")


def network() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def train(model: nn.Module, trained: nn.Module, method: str, share: slice) -> Tensor:
    """Ten steps of `model` by the gradients of `trained`, a wrapper of it or itself; its weights."""
    base = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    optimizer = EGD(base, method, rank=3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        inputs, targets = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (6, 3))
        optimizer.zero_grad()
        nn.functional.mse_loss(trained(inputs[share]), targets[share]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def work(rank: int, folder: Path) -> None:
    """Train, and save the weights."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # global generators differ between ranks
    init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    found = {}
    for method in METHODS:
        model = network()
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        found[method] = train(model, replica, method, slice(rank, None, 2))
    torch.save(found, folder / f"rank{rank}.pt")
    destroy_process_group()
