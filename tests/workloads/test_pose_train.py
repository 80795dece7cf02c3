"""Keypoint regression: the task, what it learns on blobs, what it finds, and bad input before any worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.workloads.local_runs import LocalRun, RunOf
from tests.workloads.tiny_poses import NAMES, blobs, save_coco, save_npz, save_project

import piste
from piste.checkpoints import CheckpointError
from piste.config import override, validate
from piste.errors import BadInput
from piste.ledger import open_ledger
from piste_workloads import images, pose
from piste_workloads.pose.config import Augmentation, Config, Model
from piste_workloads.pose.heatmaps import gaussian_maps
from piste_workloads.pose.model import STRIDE, HeatMaps
from piste_workloads.pose.task import KeypointTask, augment, unpack

CPU = torch.device("cpu")
ADAMW = {"name": "adamw", "lr": 1e-2}
SAM = {"rho": 0.01, "base": ADAMW}

ConfigOf = Callable[..., Config]


@pytest.fixture
def config_of(tmp_path: Path) -> ConfigOf:
    path = save_npz(tmp_path / "blobs.npz", 40)
    table: dict[str, Any] = {
        "workload": "pose",
        "model": {"width": 8, "levels": 1},
        "data": {"path": str(path)},
        "augmentation": {"shift": 3},
        "optimizer": ADAMW,
        "train": {"epochs": 30, "batch": 14, "sigma": 1.0, "pck_fraction": 0.5},
    }

    def build(overrides: Mapping[str, Any] | None = None) -> Config:
        return validate(Config, override(table, overrides or {}), "test")

    return build


def newest(run: LocalRun) -> Path:
    return max((run.directory / "checkpoints").glob("step-*"))


def last(run: LocalRun, key: str) -> float:
    return run.history(key)[-1][1]


@pytest.mark.parametrize("size", [(120, 160), (17, 23), (32, 32)])
def test_a_map_a_keypoint_at_a_quarter_of_the_size(size: tuple[int, int]) -> None:
    model = HeatMaps(Model(width=2, levels=3), 5, torch.Generator().manual_seed(0))
    maps = model(torch.zeros(2, 3, *size))
    assert maps.shape == (2, 5, -(-size[0] // STRIDE), -(-size[1] // STRIDE))


def test_a_shift_moves_keypoints_with_the_picture(config_of: ConfigOf) -> None:
    task = KeypointTask(config_of(), CPU)
    pictures, targets = task.examples("train", torch.arange(20))
    shifts = torch.randint(-12, 13, (20, 2), generator=torch.Generator().manual_seed(0))
    darkest = torch.zeros(20)
    moved, labels = augment(pictures, targets, Augmentation(brightness=0.5), darkest, shifts)
    before, after = unpack(targets), unpack(labels)
    places = before.keypoints + shifts[:, None]
    torch.testing.assert_close(after.keypoints, places)
    inside = ((places > -0.5) & (places < torch.tensor([31.5, 23.5]))).all(2)
    assert 5 < int(inside.sum()) < 35
    assert torch.equal(after.visible.bool(), inside)
    assert torch.equal(after.lengths, before.lengths)
    for number, channel in enumerate((0, 2)):
        index = moved[:, channel].flatten(1).argmax(1)
        found = torch.stack((index % 32, index // 32), -1)
        gaps = (found - places[:, number])[inside[:, number]]
        assert gaps.abs().max() <= 1.0


def test_brightness_is_a_factor(config_of: ConfigOf) -> None:
    pictures, targets = KeypointTask(config_of(), CPU).examples("train", torch.arange(20))
    still = torch.zeros(20, 2, dtype=torch.int64)
    changed, labels = augment(
        pictures, targets, Augmentation(brightness=0.5), torch.linspace(0.0, 1.0, 20), still
    )
    assert torch.equal(labels, targets)
    # The ground is 20 everywhere: its brightness is the factor, from 1 - b to 1 + b.
    torch.testing.assert_close(changed[:, 1].mean((1, 2)) / 20.0, torch.linspace(0.5, 1.5, 20))
    torch.testing.assert_close(changed[0], pictures[0] * 0.5)
    assert changed.max() == 255.0


def test_no_augmentation_is_no_change(config_of: ConfigOf) -> None:
    task = KeypointTask(config_of({"augmentation.shift": 0, "augmentation.brightness": 0.0}), CPU)
    indices = torch.tensor([4, 0, 7])
    drawn = task.batch(indices, torch.arange(3), torch.Generator().manual_seed(0))
    for ours, plain in zip(drawn, task.examples("train", indices), strict=True):
        torch.testing.assert_close(ours, plain)


def test_workers_share_one_batch(config_of: ConfigOf) -> None:
    task = KeypointTask(config_of(), CPU)
    indices = torch.randperm(28)[:14]

    def draw(mine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return task.batch(indices, mine, torch.Generator().manual_seed(1))

    whole = draw(torch.arange(14))
    for rank in range(2):
        mine = torch.arange(rank, 14, 2)
        for share, all_of_it in zip(draw(mine), whole, strict=True):
            assert torch.equal(share, all_of_it[mine])


def test_perfect_maps_have_perfect_scores(config_of: ConfigOf) -> None:
    task = KeypointTask(config_of(), CPU)
    _, targets = task.examples("valid", torch.arange(6))
    maps = gaussian_maps(unpack(targets).keypoints, (6, 8), STRIDE, 1.0)
    assert float(task.loss(maps, targets)) == 0.0
    scores = task.scores(maps, targets)
    assert scores["loss"].tolist() == [0.0] * 6
    assert scores["pck"].tolist() == [1.0] * 6
    assert float(scores["pixel_error"].max()) < 1.0  # the outermost pixels have no vertex
    shuffled = task.scores(maps.flip(1), targets)
    assert float(shuffled["pck"].mean()) < 0.5
    torch.testing.assert_close(shuffled["loss"].mean(), task.loss(maps.flip(1), targets))


def test_learns_where_the_blobs_are(run_of: RunOf, config_of: ConfigOf) -> None:
    run = run_of(pose, config_of())
    assert last(run, "test/pck") > 0.9
    assert last(run, "test/pixel_error") < 2.0
    assert [step for step, _ in run.history("test/pck")] == [60]
    assert len(run.history("valid/pixel_error")) == 30
    assert run.history("cost/gradient_evaluations")[-1] == (60, 60.0)
    assert (run.directory / "artifacts" / "keypoints.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["sam", "arsam"])
def test_two_pass_optimizers_tell_what_they_cost(name: str, run_of: RunOf, config_of: ConfigOf) -> None:
    run = run_of(pose, config_of({"optimizer": {"name": name, **SAM}, "train.epochs": 6}))
    steps = 12
    evaluations = last(run, "cost/gradient_evaluations")
    assert last(run, "optimizer/sam_fraction") == pytest.approx(evaluations / steps - 1.0)
    assert evaluations == 2 * steps if name == "sam" else steps < evaluations < 2 * steps
    assert last(run, "optimizer/psf_norm") > 0.0


def test_learns_from_a_coco_folder(run_of: RunOf, config_of: ConfigOf, tmp_path: Path) -> None:
    folder = save_coco(tmp_path / "coco", 24)
    data = {"path": str(folder), "images": "photos", "height": 24, "width": 32, "margin": 1.0}
    run = run_of(pose, config_of({"data": data}))
    assert last(run, "test/pck") > 0.9


def test_reads_a_deeplabcut_project(config_of: ConfigOf, tmp_path: Path) -> None:
    config = config_of({"data.path": str(save_project(tmp_path / "project", 25))})
    task = KeypointTask(config, CPU)
    assert dict(task.sizes) == {"train": 16, "valid": 4, "test": 4}
    assert config.total_steps == 30
    assert pose.prepare_data(config) != pose.prepare_data(config_of())


def test_finds_keypoints_in_an_image_file(run_of: RunOf, config_of: ConfigOf, tmp_path: Path) -> None:
    config = config_of()
    run = run_of(pose, config)
    pictures, keypoints = blobs(5, seed=7)
    errors = []
    for number, picture in enumerate(pictures):
        image = Image.fromarray(picture)
        image.save(tmp_path / "small.png")
        wide = Image.new("RGB", (100, 90), (20, 20, 20))
        wide.paste(image.resize((64, 48)), (30, 11))
        wide.save(tmp_path / "wide.png")
        rows = pose.predict(config, newest(run), image=str(tmp_path / "small.png"))
        assert [row["keypoint"] for row in rows] == list(NAMES)
        assert all(row["heat"] > 0.2 for row in rows)
        errors += [
            np.hypot(*(np.array([row["x"], row["y"]]) - true))
            for row, true in _pairs(rows, keypoints[number])
        ]
        boxed = pose.predict(config, newest(run), image=str(tmp_path / "wide.png"), box="30,11,94,59")
        for row, (x, y) in _pairs(boxed, keypoints[number]):
            # twice as large, and the middle of the first pixel is 0
            assert abs(row["x"] - (30 + 2 * x + 0.5)) < 5.0
            assert abs(row["y"] - (11 + 2 * y + 0.5)) < 5.0
    assert np.mean(errors) < 1.5


def _pairs(rows: list[dict[str, Any]], keypoints: Any) -> list[tuple[dict[str, Any], Any]]:
    return list(zip(rows, keypoints, strict=True))


def test_what_cannot_be_predicted_is_said(run_of: RunOf, config_of: ConfigOf, tmp_path: Path) -> None:
    config = config_of({"train.epochs": 1})
    checkpoint = newest(run_of(pose, config))
    Image.new("RGB", (32, 24)).save(tmp_path / "black.png")
    for options, message in (
        ({"image": str(tmp_path / "none.png")}, "cannot be read"),
        ({"image": str(tmp_path / "blobs.npz")}, "cannot be read"),
        (
            {"image": str(tmp_path / "black.png"), "box": "1,2,3"},
            "box = '1,2,3' must be left,upper,right,lower",
        ),
        ({"image": str(tmp_path / "black.png"), "box": "5,0,5,9"}, "must be left,upper,right,lower"),
    ):
        with pytest.raises(BadInput, match=message) as caught:
            pose.predict(config, checkpoint, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="another architecture"):
        pose.predict(config_of({"model.width": 6}), checkpoint, image=str(tmp_path / "black.png"))
    classifier = run_of(
        images,
        images.Config.model_validate(
            {"model": {"name": "mlp"}, "data": {"name": "digits"}, "train": {"epochs": 1}}
        ),
    )
    with pytest.raises(CheckpointError, match="not one of the workload pose"):
        pose.predict(config, newest(classifier), image=str(tmp_path / "black.png"))


def test_without_data_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PISTE_DATA", raising=False)
    with pytest.raises(BadInput, match=r"PISTE_DATA is not set: get an \.npz with images") as caught:
        piste.run("pose-arsam", local=True)
    assert "\n" not in str(caught.value)
    assert open_ledger().runs() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.batch": 40}, r"train.batch = 40, but there are 28 training examples"),
        ({"data.images": "photos"}, r"data.images: for a folder in COCO's format"),
        ({"data.test_fraction": 0.01}, r"40 images are too few .* 0 to test"),
        ({"train.warmup_steps": 60}, r"train.warmup_steps = 60 must be below the run's 60 steps"),
        ({"data.path": "nowhere"}, r"data.path: nowhere is not here"),
    ],
)
def test_bad_input_is_found_before_any_worker(
    settings: dict[str, Any], message: str, config_of: ConfigOf
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        pose.prepare_data(config_of(settings))
    assert "\n" not in str(caught.value)
