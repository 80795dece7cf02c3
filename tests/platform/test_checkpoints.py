"""Checkpoints: whole or absent, verified when read, kept by policy."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from piste.checkpoints import CheckpointError, CheckpointStore, load, load_model


def state(step: int, rank: int = 0) -> dict[str, object]:
    return {"step": step, "rank": rank, "weights": torch.full((50,), float(step))}


def save(store: CheckpointStore, step: int, ranks: int = 1) -> dict[str, object]:
    for rank in range(ranks):
        store.write(step, rank, state(step, rank))
    return store.commit(step)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "deep" / "checkpoints")
    assert store.latest() is None
    save(store, 10, ranks=2)
    shared, own = store.latest(rank=1) or ({}, {})
    assert (shared["step"], shared["rank"], own["rank"]) == (10, 0, 1)
    assert torch.equal(shared["weights"], torch.full((50,), 10.0))
    assert (store.latest(rank=7) or ({}, {"x": 1}))[1] == {}, "a rank that was not there has no state"


def test_a_partial_checkpoint_is_invisible(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5)
    store.write(10, 0, state(10))
    assert store.steps() == [5]
    assert (store.latest() or ({}, {}))[0]["step"] == 5
    store.commit(10)
    assert store.steps() == [5, 10]
    assert (store.latest() or ({}, {}))[0]["step"] == 10


def truncate(folder: Path) -> None:
    path = folder / "rank-0.pt"
    path.write_bytes(path.read_bytes()[:-7])


def flip(folder: Path) -> None:
    path = folder / "rank-0.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(folder: Path) -> None:
    (folder / "rank-1.pt").unlink()


def spoil_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"rank-0.pt"')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "rank-0.pt has changed since it was written"),
        (flip, "rank-0.pt has changed since it was written"),
        (remove, "rank-1.pt is missing"),
        (spoil_manifest, "no readable manifest"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    store = CheckpointStore(tmp_path, "all")
    for step in (10, 20, 30):
        save(store, step, ranks=2)
    damage(store.path(30))
    with pytest.warns(UserWarning, match=rf"^checkpoint step-000000030 is damaged \({words}\)") as caught:
        found = store.latest()
    assert found is not None
    assert found[0]["step"] == 20
    assert len(caught) == 1
    for step in (10, 20):
        remove(store.path(step))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert store.latest() is None
    assert [str(w.message).split()[1] for w in said] == [f"step-0000000{step}" for step in (30, 20, 10)]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("last 1", [50]),
        ("last 2", [40, 50]),
        ("last 9", [10, 20, 30, 40, 50]),
        ("all", [10, 20, 30, 40, 50]),
        ("trajectory 5", [10, 20, 30, 40, 50]),
    ],
)
def test_what_is_kept(tmp_path: Path, keep: str, kept: list[int]) -> None:
    store = CheckpointStore(tmp_path, keep)
    for step in (10, 20, 30, 40, 50):
        save(store, step)
    assert store.steps() == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:09d}" for step in kept]


def test_the_same_step_again_replaces_the_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10)
    store.write(10, 0, {"step": 10, "again": True})
    store.commit(10)
    assert store.steps() == [10]
    assert (store.latest() or ({}, {}))[0] == {"step": 10, "again": True}


def test_the_record_is_checked_against_the_files(tmp_path: Path) -> None:
    record = save(CheckpointStore(tmp_path), 10, ranks=3)
    folder = tmp_path / "step-000000010"
    files = sorted(folder.glob("*.pt"))
    assert [f.name for f in files] == ["rank-0.pt", "rank-1.pt", "rank-2.pt"]
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in files:
        content = file.read_bytes()
        assert manifest[file.name] == [len(content), hashlib.sha256(content).hexdigest()]
    assert record["size"] == sum(f.stat().st_size for f in files)
    assert {k: record[k] for k in ("kind", "name", "uri", "step")} == {
        "kind": "checkpoint",
        "name": "step-000000010",
        "uri": str(folder),
        "step": 10,
    }
    other = CheckpointStore(tmp_path / "other")
    other.write(10, 0, {"step": 11})
    assert other.commit(10)["sha256"] != record["sha256"]
    assert len(str(record["sha256"])) == 64


def test_a_model_of_another_architecture_is_refused_by_its_first_mismatch() -> None:
    model = torch.nn.Linear(3, 2)
    fits = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    load_model(model, fits, "run-1")
    assert torch.equal(model.weight, torch.ones(2, 3))
    cases = {
        "it has no 'bias'": {"weight": torch.zeros(2, 3)},
        r"'weight' is \(2, 4\) there, \(2, 3\) here": {**fits, "weight": torch.zeros(2, 4)},
        "'extra' has no place in this model": {**fits, "weight": torch.zeros(2, 3), "extra": torch.zeros(1)},
    }
    for words, wrong in cases.items():
        with pytest.raises(CheckpointError, match=f"^run-1: another architecture: {words}$"):
            load_model(model, wrong, "run-1")
        assert torch.equal(model.weight, torch.ones(2, 3)), "nothing is loaded from what does not fit"


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank-0\.pt: no such file$"):
        load(tmp_path)
    (tmp_path / "rank-0.pt").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match=r"rank-0\.pt: not a checkpoint$"):
        load(tmp_path)


def test_an_unwritable_folder_is_one_line_with_a_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = CheckpointStore(tmp_path / "file" / "checkpoints")
    with pytest.raises(
        CheckpointError, match="cannot be written: Not a directory: free space or set"
    ) as caught:
        store.write(10, 0, state(10))
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="cannot be written"):
        CheckpointStore(tmp_path).commit(10)  # nothing was written


def test_a_full_disk_leaves_no_partial_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    store = CheckpointStore(tmp_path)
    save(store, 10)
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            store.write(20, 0, state(20))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000010"]
