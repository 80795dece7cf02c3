"""Two workers with averaged gradients tell the same of the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.workloads.image_workers import CONFIG, work
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from piste_workloads.images.task import Classification
from piste_workloads.images.train import network_of


def test_two_workers_report_one_model(tmp_path: Path) -> None:
    task = Classification(CONFIG, torch.device("cpu"))  # and the cache, as `prepare_data` makes it
    spawn(work, args=(tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    left, right = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    of_each_worker = {key for key in left["metrics"] if key.startswith("time/")} | {"train/lr"}
    assert left["metrics"].keys() == right["metrics"].keys()
    for key in left["metrics"].keys() - of_each_worker - {"sharpness/top_eigenvalue"}:
        assert left["metrics"][key] == right["metrics"][key], key
    parameters = [name for name in left["model"] if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(left["model"][name], right["model"][name]) for name in parameters)

    # What both report of held-out images is what rank 0's checkpoint does, its batch norm included.
    model = network_of(CONFIG, task, 1)
    model.load_state_dict(left["model"])
    model.eval()
    for part in ("valid", "test"):
        inputs, labels = task.examples(part, torch.arange(task.sizes[part]))
        with torch.no_grad():
            scores: dict[str, Tensor] = task.scores(model(inputs), labels)
        for key, values in scores.items():
            found = left["metrics"][f"{part}/{key}"][-1]
            assert found == pytest.approx(float(values.double().mean()), rel=1e-6), (part, key)
