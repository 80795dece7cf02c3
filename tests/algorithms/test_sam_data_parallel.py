"""Two processes with averaged gradients decide alike, hold the same weights, and do what one process does."""

from pathlib import Path

import torch
from tests.algorithms.data_parallel import STEPS, work
from tests.algorithms.sharpness import FAMILY, batches, network, sgd, train, weights
from torch.multiprocessing.spawn import spawn


def test_two_processes_are_one(tmp_path: Path) -> None:
    spawn(work, args=(tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    left, right = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for name, build in FAMILY.items():
        assert torch.equal(left[name]["weights"], right[name]["weights"])
        assert left[name]["memory"] == right[name]["memory"]
        assert left[name]["chosen"] == right[name]["chosen"]
        model = network()
        assert train(model, build(sgd(model)), batches(STEPS)) == left[name]["chosen"]
        torch.testing.assert_close(weights(model), left[name]["weights"], rtol=0, atol=1e-11)
        assert (0 < sum(left[name]["chosen"]) < STEPS) == (name != "sam")
