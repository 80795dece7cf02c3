"""Pictures with keypoints: the formats that are read, the split, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from tests.workloads.tiny_poses import NAMES, blobs, save_coco, save_npz, save_project

from piste.errors import BadInput, PisteError
from piste_workloads.pose.coco import read_coco, square_box
from piste_workloads.pose.config import Data
from piste_workloads.pose.deeplabcut import read_project
from piste_workloads.pose.examples import Examples, find, from_crop, split, to_crop
from piste_workloads.pose.frames import read_frames


def brightest(pictures: torch.Tensor, channel: int) -> torch.Tensor:
    """x and y of the brightest pixel of a channel, `(n, 2)`: a blob's centre to half a pixel."""
    index = pictures[:, channel].flatten(1).int().argmax(1)
    width = pictures.shape[3]
    return torch.stack((index % width, index // width), -1)


def test_frames_of_an_npz(tmp_path: Path) -> None:
    examples = read_frames(save_npz(tmp_path / "blobs.npz"), Data())
    pictures, keypoints = blobs()
    assert examples.names == NAMES
    assert examples.size == (24, 32)
    assert len(examples) == 24
    np.testing.assert_array_equal(examples.read([3, 1]).permute(0, 2, 3, 1).numpy(), pictures[[3, 1]])
    np.testing.assert_allclose(examples.keypoints.numpy(), keypoints, rtol=1e-6)
    assert examples.visible.min() == 1.0
    assert torch.unique(examples.scale).tolist() == [1.0]
    sides = np.abs(keypoints[:, 0] - keypoints[:, 1]).max(axis=1)
    np.testing.assert_allclose(examples.lengths.numpy(), sides, rtol=1e-6)


def test_frames_are_resized_with_their_keypoints(tmp_path: Path) -> None:
    examples = read_frames(save_npz(tmp_path / "blobs.npz"), Data(height=48, width=32))
    _, keypoints = blobs()
    pictures = examples.read(range(24))
    assert pictures.shape == (24, 3, 48, 32)
    assert examples.scale[0].tolist() == [1.0, 0.5]
    np.testing.assert_allclose(examples.keypoints[..., 0].numpy(), keypoints[..., 0], atol=1e-5)
    for number, channel in enumerate((0, 2)):
        gap = brightest(pictures, channel) - examples.keypoints[:, number]
        assert gap.abs().max() <= 2.0
        assert gap.mean(0).abs().max() < 0.6  # no shift that all have in common


def test_a_missing_keypoint_of_a_frame_does_not_count(tmp_path: Path) -> None:
    pictures, keypoints = blobs(4)
    keypoints[2, 0] = np.nan
    np.savez(tmp_path / "gaps.npz", images=pictures, keypoints=keypoints)
    examples = read_frames(tmp_path / "gaps.npz", Data())
    assert examples.names == ("0", "1")
    assert examples.visible.tolist() == [[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]
    assert examples.keypoints.isfinite().all()


def coco(folder: Path, **data: Any) -> Examples:
    return read_coco(folder, Data(images="photos", **data))


def test_people_of_a_coco_folder(tmp_path: Path) -> None:
    examples = coco(save_coco(tmp_path / "coco"), height=36, width=48, margin=1.5)
    assert examples.names == NAMES
    assert len(examples) == 24  # without the crowd and the one without keypoints
    assert examples.visible.tolist() == [[1.0, 1.0], [1.0, 0.0]] * 12
    assert torch.unique(examples.lengths).tolist() == [32.0]
    assert examples.image.tolist() == [number for number in range(12) for _ in range(2)]
    # 1.5 x (32, 24) pixels of the photograph are a picture of 48 x 36.
    assert torch.unique(examples.scale).tolist() == [1.0]
    pictures = examples.read(range(24))
    assert pictures.shape == (24, 3, 36, 48)
    red = brightest(pictures, 0) - examples.keypoints[:, 0]
    assert red.abs().max() <= 0.75
    blue = (brightest(pictures, 2) - examples.keypoints[:, 1])[::2]
    assert blue.abs().max() <= 0.75


def test_a_crop_has_the_shape_of_the_input_and_holds_the_box() -> None:
    left, upper, right, lower = square_box([10.0, 20.0, 30.0, 10.0], 1.2, (128, 96))
    # 36 wide, 36 x 128 / 96 = 48 high, around the middle (25, 25)
    assert (left, upper, right, lower) == (7, 1, 43, 49)
    with pytest.raises(ValueError, match="is empty"):
        square_box([1.0, 1.0, 0.0, 3.0], 1.2, (128, 96))


def test_points_of_a_crop_and_back() -> None:
    points = np.random.default_rng(0).uniform(0, 50, (7, 2))
    box = (-3, 5, 45, 29)
    np.testing.assert_allclose(from_crop(to_crop(points, box, (48, 24)), box, (48, 24)), points, atol=1e-12)
    # The box's corners are half a pixel outside the crop's outermost ones.
    corners = np.array([[-3.5, 4.5], [44.5, 28.5]])
    np.testing.assert_allclose(to_crop(corners, box, (48, 24)), [[-0.5, -0.5], [23.5, 47.5]])


@pytest.mark.parametrize("columns", [1, 3])
def test_frames_of_a_deeplabcut_project(tmp_path: Path, columns: int) -> None:
    examples = read_project(save_project(tmp_path / "project", 6, columns), Data())
    pictures, keypoints = blobs(6)
    assert examples.names == NAMES
    np.testing.assert_array_equal(examples.read(range(5)).permute(0, 2, 3, 1).numpy(), pictures[:5])
    np.testing.assert_allclose(examples.keypoints.numpy(), keypoints[:5], rtol=1e-6)
    resized = read_project(tmp_path / "project", Data(height=16, width=16))
    assert resized.size == (16, 16)
    assert resized.scale[0].tolist() == [2.0, 1.5]


def test_a_split_keeps_the_people_of_an_image_together(tmp_path: Path) -> None:
    examples = coco(save_coco(tmp_path / "coco"))
    data = Data(validation_fraction=0.25, test_fraction=1 / 3)
    parts = split(examples, data)
    images = [set(examples.image[part].tolist()) for part in (parts.train, parts.valid, parts.test)]
    assert [len(part) for part in images] == [5, 3, 4]
    assert set.union(*images) == set(range(12))
    assert len(parts.train) + len(parts.valid) + len(parts.test) == 24
    assert split(examples, data) == parts
    assert split(examples, data.model_copy(update={"seed": 1})) != parts


def test_too_few_images_to_split(tmp_path: Path) -> None:
    examples = read_frames(save_npz(tmp_path / "few.npz", 3), Data())
    with pytest.raises(BadInput, match=r"3 images are too few .* 3 to train on, 0 to validate, 0 to test"):
        split(examples, Data())


def test_data_are_looked_for_here_and_in_the_folder_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PISTE_DATA", raising=False)
    wanted = Data().path
    with pytest.raises(BadInput, match=r"is not here and PISTE_DATA is not set: get an .npz with images"):
        find(wanted)
    monkeypatch.setenv("PISTE_DATA", str(tmp_path))
    with pytest.raises(BadInput, match=r"is not here nor in PISTE_DATA = .*set data.path to it"):
        find(wanted)
    (tmp_path / "pose").mkdir()
    place = save_npz(tmp_path / wanted)
    assert find(wanted) == place
    assert find(place) == place


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"keypoints": np.zeros((2, 1, 2))}, "it has no array 'images'; there are: keypoints"),
        ({"images": np.zeros((2, 8, 8)), "keypoints": np.zeros((2, 1, 2))}, r"got \(2, 8, 8\) float64"),
        (
            {"images": np.zeros((2, 8, 8, 3), np.uint8), "keypoints": np.zeros((3, 1, 2))},
            r"keypoints must be \(2, k, 2\) numbers, got \(3, 1, 2\)",
        ),
        (
            {"images": np.zeros((1, 8, 8, 3), np.uint8), "keypoints": np.full((1, 1, 2), np.nan)},
            "a frame has no keypoint",
        ),
    ],
)
def test_an_npz_of_other_arrays_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(BadInput, match=message):
        read_frames(tmp_path / "other.npz", Data())


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(BadInput, match=r"text.npz: not an .npz of arrays, nor a folder"):
        read_frames(tmp_path / "text.npz", Data())


def test_what_is_wrong_with_a_coco_folder_is_named(tmp_path: Path) -> None:
    folder = save_coco(tmp_path / "coco")
    file = folder / "annotations" / "person_keypoints_tiny.json"
    with pytest.raises(BadInput, match=r"000.png: no such image: set data.images"):
        read_coco(folder, Data())
    with pytest.raises(BadInput, match=r"other.json: no such file"):
        coco(folder, annotations="other.json")
    copy = folder / "more_keypoints.json"
    copy.write_bytes(file.read_bytes())
    with pytest.raises(BadInput, match=r"2 are there: name one in data\.annotations"):
        coco(folder)
    assert len(coco(folder, annotations="more_keypoints.json")) == 24
    table = json.loads(copy.read_text())
    for change, message in (
        ({"categories": []}, "0 categories with keypoints"),
        ({"annotations": []}, "no person with a labelled keypoint"),
        ({"annotations": [{**table["annotations"][0], "bbox": [0, 0, 0, 5]}]}, "is empty"),
        ({"annotations": [{**table["annotations"][0], "image_id": 7}]}, "KeyError"),
    ):
        copy.write_text(json.dumps({**table, **change}))
        with pytest.raises(BadInput, match=message):
            coco(folder, annotations="more_keypoints.json")
    copy.write_text("[]")
    with pytest.raises(BadInput, match="it has no 'annotations'"):
        coco(folder, annotations="more_keypoints.json")
    copy.write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        coco(folder, annotations="more_keypoints.json")
    with pytest.raises(BadInput, match="none is there: name the file"):
        coco(folder / "photos")


def test_a_broken_photograph_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder = save_coco(tmp_path / "coco")
    (folder / "photos" / "003.png").write_bytes(b"no picture")
    examples = coco(folder)
    assert examples.read([0, 1]).shape == (2, 3, 128, 96)
    with pytest.raises(PisteError, match=r"003.png: cannot be read: .*: replace it"):
        examples.read([5, 6])


def test_what_is_wrong_with_a_project_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no labeled-data/VIDEO/CollectedData_SCORER\.csv"):
        read_project(tmp_path, Data())
    folder = save_project(tmp_path / "project")
    file = folder / "labeled-data" / "film" / "CollectedData_me.csv"
    text = file.read_text()
    for before, after, message in (
        ("bodyparts", "individuals", "must be scorer, bodyparts and coords"),
        ("x,y,x,y", "x,y,y,x", "x and y of each body part in turn"),
        ("img000.png,", "img000.png,one,", "could not convert"),
        ("img000.png,", "img000.png,1.0,", "has 5 coordinates of 4"),
        ("img000", "imgxxx", "imgxxx.png: cannot be read"),
    ):
        file.write_text(text.replace(before, after))
        with pytest.raises(BadInput, match=message):
            read_project(folder, Data())
    file.write_text(text)
    Image.new("RGB", (5, 5)).save(folder / "labeled-data" / "film" / "img001.png")
    with pytest.raises(BadInput, match="5 x 5 pixels, and the first frame has 24 x 32"):
        read_project(folder, Data())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 32}, "give height and width, or neither"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leaves nothing to train on"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Data(**settings)
