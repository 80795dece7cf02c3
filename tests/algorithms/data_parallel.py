"""What one of two data-parallel processes does: every member of the family on its half of each batch."""

from pathlib import Path
from typing import Any

import torch
from tests.algorithms.sharpness import FAMILY, batches, network, sgd, weights
from torch import Tensor
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

STEPS = 15


def work(rank: int, folder: Path) -> None:
    """Train, in two micro-batches a step, and save what the test compares."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # global generators differ between ranks
    init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, build in FAMILY.items():
        model = network()
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = build(sgd(model), model=model)
        chosen = []
        for inputs, labels in batches(STEPS):
            parts = list(zip(inputs[rank::2].chunk(2), labels[rank::2].chunk(2), strict=True))

            def closure(
                parts: list[tuple[Tensor, Tensor]] = parts,
                replica: DistributedDataParallel = replica,
                optimizer: Any = optimizer,
            ) -> float:
                optimizer.zero_grad()
                with replica.no_sync():
                    first = cross_entropy(replica(parts[0][0]), parts[0][1]) / 2
                    first.backward()  # type: ignore[no-untyped-call]
                second = cross_entropy(replica(parts[1][0]), parts[1][1]) / 2
                second.backward()  # type: ignore[no-untyped-call]
                return float(first.detach() + second.detach())

            before = optimizer.sam_steps
            optimizer.step(closure)
            chosen.append(optimizer.sam_steps > before)
        memory = optimizer.state_dict()["memory"]
        found[name] = {"weights": weights(model), "chosen": chosen, "memory": memory}
    torch.save(found, folder / f"rank{rank}.pt")
    destroy_process_group()
