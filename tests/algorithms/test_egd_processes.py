"""Two data-parallel processes whiten the averaged gradient: they hold the weights that one process has."""

from pathlib import Path

import pytest
import torch
from tests.algorithms.egd_processes import METHODS, network, train, work
from torch.multiprocessing.spawn import spawn


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    spawn(work, args=(tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    left, right = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for method in METHODS:
        assert torch.equal(left[method], right[method])
        model = network()
        alone = train(model, model, method, slice(None))
        torch.testing.assert_close(left[method], alone, rtol=0, atol=1e-11)
