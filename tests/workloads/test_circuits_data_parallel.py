"""Two workers that sum their flows learn what one learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.workloads.circuit_workers import config_of, train, work
from tests.workloads.small_recipes import SMALL_TEXT
from torch.multiprocessing.spawn import spawn

RULES = ["full-batch-em", "mini-batch-em", "online-em", "anemone", "adam"]


def test_two_workers_learn_what_one_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISTE_HOME", str(tmp_path / "home"))
    text = tmp_path / "text.txt"
    text.write_text(SMALL_TEXT, encoding="utf-8")
    spawn(work, args=(tmp_path, text, RULES), nprocs=2)  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for rule in RULES:
        one, (left, right) = train(config_of(text, 1, rule)), (found[rule] for found in ranks)
        assert all(torch.equal(left["model"][name], right["model"][name]) for name in left["model"]), rule
        for name, table in one["model"].items():
            torch.testing.assert_close(left["model"][name], table, rtol=1e-5, atol=1e-6)
        assert left["metrics"].keys() == one["metrics"].keys()
        for key, values in one["metrics"].items():
            if not key.startswith("time/"):
                assert left["metrics"][key] == right["metrics"][key], (rule, key)
                tolerance = 1e-4 if key.startswith("rule/") else 1e-6
                assert left["metrics"][key] == pytest.approx(values, rel=tolerance), (rule, key)
