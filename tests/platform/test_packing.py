"""Packs: who goes together, what is kept, what they cost, and how large they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from piste.building import build_optimizer, parameter_groups
from piste.config import Checkpoints, Optimizer, Recipe, Resources
from piste.packing import (
    Measurement,
    PackedRuns,
    PackSizer,
    free_memory,
    groups,
    run_pack,
    single_optimizer,
)

NAN, INF = float("nan"), float("inf")


def workload(**functions: Callable[..., Any]) -> ModuleType:
    module = ModuleType("packed")
    vars(module).update(functions)
    return module


def recipes(count: int) -> list[Recipe]:
    return [Recipe(workload="packed", seed=seed) for seed in range(count)]


# What is kept


@pytest.mark.parametrize("history", [True, False])
def test_keeps_every_value_or_the_last(history: bool) -> None:
    runs = PackedRuns([7, 8, 9], history=history)
    assert (len(runs), runs.seeds) == (3, (7, 8, 9))
    losses = torch.tensor([1.0, 2.0, INF], dtype=torch.float32)
    runs.log({"train/loss": losses}, 1)
    runs.log({"train/loss": losses * torch.tensor([0.5, NAN, 0.5])}, 2)
    runs.log({"valid/loss": torch.ones(3)}, 2)
    losses.zero_()  # a workload may go on with its own tensor
    values = runs.values()
    assert {key: steps for key, (steps, _) in values.items()} == {
        "train/loss": (1, 2) if history else (2,),
        "valid/loss": (2,),
    }
    expected = [[1.0, 2.0, INF], [0.5, NAN, INF]]
    found = values["train/loss"][1]
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, expected if history else expected[1:])
    np.testing.assert_array_equal(values["valid/loss"][1], [[1.0, 1.0, 1.0]])


def test_refuses_what_is_not_one_value_a_trial() -> None:
    with pytest.raises(ValueError, match=r"train/loss must be of shape \(2,\), got \(2, 1\)"):
        PackedRuns([0, 1]).log({"train/loss": torch.zeros(2, 1)}, 1)


# Who goes together


def test_equal_keys_go_together_and_none_goes_alone() -> None:
    keys = ["a", None, "b", "a", None, "a", "b"]
    module = workload(train_many=print, pack_key=lambda config: keys[config.seed])
    assert groups(module, recipes(7)) == ([[0, 3, 5], [2, 6]], [1, 4])


def test_a_workload_without_packed_training_has_no_packs() -> None:
    assert groups(workload(pack_key=lambda config: 0), recipes(2)) == ([], [0, 1])
    assert groups(workload(train_many=print), recipes(2)) == ([], [0, 1])


def test_several_workers_and_wanted_checkpoints_run_alone() -> None:
    plain, distributed, kept, also_kept = recipes(4)
    distributed = distributed.model_copy(update={"resources": Resources(workers=2)})
    kept = kept.model_copy(update={"checkpoints": Checkpoints(every=5)})
    also_kept = also_kept.model_copy(update={"checkpoints": Checkpoints(keep="all")})
    module = workload(train_many=print, pack_key=lambda config: 0)
    assert groups(module, [plain, distributed, kept, also_kept]) == ([[0]], [1, 2, 3])


@pytest.mark.parametrize(
    "table",
    [
        {"name": "adamw", "groups": [{"match": ".*", "lr": 0.1}]},
        {"name": "sgd", "base": {"name": "adamw"}},
        {"name": "no_such_optimizer"},
    ],
)
def test_sections_of_more_than_a_name_and_keywords(table: dict[str, Any]) -> None:
    assert single_optimizer(Optimizer.model_validate(table)) is None
    assert single_optimizer(Optimizer.model_validate({"name": "adamw", "lr": 0.1})) is torch.optim.AdamW


@pytest.mark.parametrize("name", ["sgd", "reg"])
def test_parameter_groups_are_those_of_the_built_optimizer(name: str) -> None:
    section = Optimizer.model_validate({"name": name, "lr": 0.1, "weight_decay": 0.3})
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    own = parameter_groups(section, model)
    built = build_optimizer(section, model).param_groups
    assert len(own) == len(built)
    for proposed, group in zip(own, built, strict=True):
        assert [id(p) for p in proposed["params"]] == [id(p) for p in group["params"]]
        complete = {"lr": 0.1, "weight_decay": 0.3, **proposed}
        assert {key: group[key] for key in complete if key != "params"} == {
            key: value for key, value in complete.items() if key != "params"
        }


# What it costs


class Memory:
    """`train_many` of a workload that logs its seeds, on a machine with room for so many trials."""

    def __init__(self, room: int, error: BaseException) -> None:
        self.room = room
        self.error = error
        self.tried: list[int] = []

    def __call__(self, configs: Sequence[Recipe], runs: PackedRuns) -> None:
        assert [config.seed for config in configs] == [seed - 10 for seed in runs.seeds]
        self.tried.append(len(runs))
        seeds = torch.tensor(runs.seeds, dtype=torch.float64)
        runs.log({"loss": seeds}, 1)
        if len(runs) > self.room:
            raise self.error
        runs.log({"loss": seeds * 2}, 2)


def run(train_many: Callable[..., Any], count: int, **options: Any) -> PackedRuns:
    module = workload(train_many=train_many)
    return run_pack(module, recipes(count), [seed + 10 for seed in range(count)], **options)


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_pack_without_memory_is_halved(error: BaseException, history: bool) -> None:
    train_many = Memory(3, error)
    runs = run(train_many, 9, history=history)
    assert train_many.tried == [9, 4, 2, 2, 5, 2, 3]
    assert [(each.trials, each.bytes is None) for each in runs.measured] == [
        (9, True),
        (4, True),
        (2, False),
        (2, False),
        (5, True),
        (2, False),
        (3, False),
    ]
    steps, values = runs.values()["loss"]
    expected = np.arange(10.0, 19.0)
    assert steps == ((1, 2) if history else (2,))
    np.testing.assert_array_equal(values, [expected, 2 * expected] if history else [2 * expected])


def test_torch_s_own_complaint_about_the_cpu_is_out_of_memory() -> None:
    def train_many(configs: Sequence[Recipe], runs: PackedRuns) -> None:
        if len(runs) > 1:
            torch.empty(2**50, dtype=torch.uint8)
        runs.log({"loss": torch.zeros(len(runs))}, 1)

    assert [each.bytes is None for each in run(train_many, 2).measured] == [True, False, False]


def test_a_trial_that_is_too_large_alone_is_an_error() -> None:
    with pytest.raises(MemoryError):
        run(Memory(0, MemoryError()), 4)


def test_other_errors_end_the_pack() -> None:
    train_many = Memory(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(train_many, 4)
    assert train_many.tried == [4]


def test_memory_and_time_are_measured() -> None:
    size = 2**26  # bytes

    def train_many(configs: Sequence[Recipe], runs: PackedRuns) -> None:
        held = torch.ones(size // 4, dtype=torch.float32)
        for step in range(5):
            runs.log({"loss": held.sum().expand(len(runs))}, step)

    (measured,) = run(train_many, 2).measured
    assert measured.trials == 2
    assert measured.seconds > 0.0
    assert measured.bytes is not None
    assert 0.9 * size <= measured.bytes <= 2 * size
    assert 0 < measured.free < 2**50


# How large it becomes

MIB = 2**20


def sizes(sizer: PackSizer, seconds: Callable[[int], float], trial_bytes: int, free: int) -> list[int]:
    """The sizes of ten packs that cost what the arguments say."""
    found = []
    for _ in range(10):
        found.append(sizer.size)
        sizer.record(sizer.size, seconds(sizer.size), sizer.size * trial_bytes, free)
    return found


def test_grows_while_a_trial_becomes_cheaper() -> None:
    # 32: 10.3 ms/32; 128: 11.3/128; 512: 15.1/512; 2048: 30.5/2048 = 14.9 us; 8192: 91.9/8192 = 11.2 us;
    # 32768: 338/32768 = 10.3 us, which is no longer a tenth less.
    found = sizes(PackSizer(), lambda n: 10e-3 + 10e-6 * n, 1, 2**40)
    assert found == [32, 128, 512, 2048, 8192, *[32768] * 5]


def test_goes_back_where_a_trial_becomes_dearer() -> None:
    found = sizes(PackSizer(), lambda n: 1e-3 + n * (1e-6 if n <= 1000 else 1e-5), 1, 2**40)
    assert found == [32, 128, 512, 2048, *[512] * 6]


def test_stays_within_its_share_of_the_memory() -> None:
    found = sizes(PackSizer(memory_share=0.25), lambda n: 1.0, MIB, 4 * 1000 * MIB)
    assert found == [32, 128, 512, *[1000] * 7]


def test_shrinks_when_memory_becomes_scarce() -> None:
    sizer = PackSizer(start=64)
    sizer.record(64, 1.0, 64 * MIB, free=40 * MIB)
    assert sizer.size == 10
    sizer.record(10, 1.0, 10 * MIB, free=MIB)
    assert sizer.size == 1


def test_remembers_what_did_not_fit() -> None:
    sizer = PackSizer()
    sizer.record(32, 1.0, 0, free=2**40)
    sizer.failed(128)
    assert sizer.size == 64
    assert max(sizes(sizer, lambda n: 1.0, 0, 2**40)) == 64
    sizer.failed(1)
    assert sizer.size == 1


def test_learns_from_what_run_pack_measures() -> None:
    sizer = PackSizer(start=8)
    sizer.learn(run(Memory(3, MemoryError()), 8).measured)
    assert sizer.size == 2
    grown = PackSizer(start=8)
    grown.learn([Measurement(8, 1.0, 8 * MIB, 2**40)])
    assert grown.size == 32


def test_a_remainder_says_nothing_about_time_but_all_about_memory() -> None:
    sizer = PackSizer()
    sizer.record(5, 0.001, 5 * MIB, free=2**40)
    assert sizer.size == 32
    sizer.record(5, 0.001, 5 * 16 * MIB, free=4 * 160 * MIB)
    assert sizer.size == 10


@given(
    overhead=st.floats(1e-6, 10.0),
    each=st.floats(1e-7, 1.0),
    trial_bytes=st.integers(0, 2**32),
    free=st.integers(2**20, 2**42),
    fits=st.integers(1, 2**20),
)
def test_settles_within_memory(overhead: float, each: float, trial_bytes: int, free: int, fits: int) -> None:
    sizer, found = PackSizer(), []
    for _ in range(40):
        found.append(size := sizer.size)
        if size > fits:
            sizer.failed(size)
            assert sizer.size <= max(1, size // 2)
        else:
            sizer.record(size, overhead + each * size, trial_bytes * size, free)
            assert sizer.size <= 4 * size
            assert sizer.size == 1 or sizer.size * trial_bytes <= 0.25 * free
    failed = [size for size in found if size > fits]
    assert len(set(failed)) == len(failed), "a size that did not fit was tried again"
    assert found[-5:] == [found[-1]] * 5
    assert 1 <= found[-1] <= 2**16


def test_free_memory_is_less_than_the_host_has() -> None:
    assert 0 < free_memory(torch.device("cpu")) <= psutil.virtual_memory().total
