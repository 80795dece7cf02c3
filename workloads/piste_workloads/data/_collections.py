"""Collections of images in a file or folder of your own: pickled batches, class folders, or arrays.

    batches     .../data_batch_1 ... 5 and test_batch, or .../train and test     as CIFAR is published
    folders     .../train/CLASS/NAME.jpg and .../test/CLASS/NAME.jpg             any format that Pillow reads
    arrays      x_train, y_train, x_test, y_test in an npz                       (n, height, width, channels)

The first two lie in a tar archive or in a folder.
"""

from __future__ import annotations

import io
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from piste.errors import BadInput
from piste_workloads.data._cache import cached
from piste_workloads.data._dataset import Arrays
from piste_workloads.data._members import fingerprint, members
from piste_workloads.data._pickles import unpickle

Pixels = NDArray[np.uint8]
SPLITS = ("train", "test")
SIDE = 32  # height and width of an image in pixels
PICTURE = re.compile(r"(?:.*/)?(train|test)/([^/]+)/[^/.][^/]*\.(?:jpe?g|png|bmp|gif|webp|ppm|tiff?)", re.I)


@dataclass(frozen=True)
class Layout:
    """What a collection is to look like.

    Attributes:
        classes: How many there are.
        batches: By split, a regular expression for the names of its pickled batches.
        labels: The labels' key in a batch.
        names: The name of the pickle with the classes' names, and their key in it.
    """

    classes: int
    batches: dict[str, str]
    labels: str
    names: tuple[str, str]

    def split_of(self, name: str) -> str | None:
        """The split of a pickled batch, by its path; None: it is none."""
        last = name.rpartition("/")[2]
        return next((split for split, pattern in self.batches.items() if re.fullmatch(pattern, last)), None)

    def wants(self, name: str) -> bool:
        """Whether a member belongs to the collection."""
        named = name.rpartition("/")[2] == self.names[0]
        return named or PICTURE.fullmatch(name) is not None or self.split_of(name) is not None


class Examples(NamedTuple):
    """What a member holds.

    Attributes:
        split: `train` or `test`.
        name: The member's path, by which members are put in order.
        images: `(n, 3, 32, 32)`.
        labels: The number of each class, or its name.
    """

    split: str
    name: str
    images: Pixels
    labels: list[int] | list[str]


@dataclass(frozen=True)
class Collection:
    """What a file or folder holds.

    Attributes:
        parts: By split the images `(n, 3, 32, 32)` and their labels `(n,)`.
        classes: The names of the labels.
        skipped: The members that could not be read, and why.
        version: The file's sha256; empty for a folder.
        pictures: Whether the images were single pictures, decoded.
    """

    parts: dict[str, tuple[Pixels, NDArray[np.int64]]]
    classes: tuple[str, ...]
    skipped: tuple[str, ...]
    version: str
    pictures: bool


def read_collection(place: Path, layout: Layout, skip_bad: bool) -> Collection:
    """Reads a collection; one in a file is decoded once and then found in the cache.

    Args:
        place: The file or folder.
        layout: What it is to look like.
        skip_bad: Leave out members that cannot be read.

    Raises:
        BadInput: It cannot be read, is no such collection, or has a member that cannot be read, which is
            named.
    """
    if place.is_dir():
        version, arrays = "", _read(place, layout, skip_bad)
    else:
        version = fingerprint(place)
        arrays = cached(version, lambda: _read(place, layout, skip_bad))
    skipped = tuple(map(str, arrays["skipped"]))
    if skipped and not skip_bad:  # by the run that has filled the cache
        raise _bad_member(place, skipped[0])
    return Collection(
        parts={split: (arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in SPLITS},  # type: ignore[misc]
        classes=tuple(map(str, arrays["classes"])),
        skipped=skipped,
        version=version,
        pictures=bool(arrays["pictures"]),
    )


def _read(place: Path, layout: Layout, skip_bad: bool) -> Arrays:
    if place.suffix == ".npz":
        return _arrays(place, layout)
    found: list[Examples] = []
    names: list[str] = []
    skipped: list[str] = []
    for name, content in members(place, layout.wants):
        try:
            if name.rpartition("/")[2] == layout.names[0]:
                names = [_text(each) for each in unpickle(content).get(layout.names[1], [])]
            else:
                found.append(_examples(name, content, layout))
        except ValueError as error:
            skipped.append(f"{name}: {error}")
            if not skip_bad:
                raise _bad_member(place, skipped[0]) from None
    by_name = any(isinstance(label, str) for examples in found for label in examples.labels[:1])
    if by_name:
        names = sorted({str(label) for examples in found for label in examples.labels})
        if len(names) != layout.classes:
            raise BadInput(f"{place}: {len(names)} class folders instead of {layout.classes}")
    classes = names or [str(number) for number in range(layout.classes)]
    arrays: dict[str, NDArray[Any]] = {"pictures": np.array(by_name)}
    for split in SPLITS:
        parts = sorted((part for part in found if part.split == split), key=lambda part: part.name)
        if not parts:
            raise BadInput(f"{place}: no {split} images: neither pickled batches nor {split}/CLASS/NAME.jpg")
        labels = [label for part in parts for label in part.labels]
        numbers = [classes.index(label) if isinstance(label, str) else label for label in labels]
        arrays |= {f"x_{split}": np.concatenate([part.images for part in parts])}
        arrays |= {f"y_{split}": np.array(numbers, np.int64)}
    return {**arrays, "classes": np.array(classes), "skipped": np.array(skipped, np.str_)}


def _bad_member(place: Path, member: str) -> BadInput:
    return BadInput(f"{place}: bad member {member}: mend it, or leave it out with --skip-bad (data.skip_bad)")


def _examples(name: str, content: bytes, layout: Layout) -> Examples:
    """What a picture or a batch holds.

    Raises:
        ValueError: It is damaged.
    """
    if (found := PICTURE.fullmatch(name)) is not None:
        return Examples(found[1].lower(), name, _picture(content)[None], [found[2]])
    split = layout.split_of(name)
    assert split is not None
    return Examples(split, name, *_batch(unpickle(content), layout))


def _batch(batch: dict[str, Any], layout: Layout) -> tuple[Pixels, list[int]]:
    """The images and labels of a pickled batch.

    Raises:
        ValueError: It is none.
    """
    images, labels = batch.get("data"), batch.get(layout.labels)
    if not isinstance(labels, list) or not isinstance(images, np.ndarray):
        raise ValueError(f"it has no array `data` and list `{layout.labels}`")
    if images.shape != (len(labels), 3 * SIDE**2):
        raise ValueError(f"`data` is {images.shape} instead of {(len(labels), 3 * SIDE**2)}")
    if not all(isinstance(label, int) and 0 <= label < layout.classes for label in labels):
        raise ValueError(f"a label is no number from 0 to {layout.classes - 1}")
    return images.astype(np.uint8).reshape(-1, 3, SIDE, SIDE), labels


def _picture(content: bytes) -> Pixels:
    """A picture's pixels, `(3, 32, 32)`.

    Raises:
        ValueError: It cannot be decoded, or has another size.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to
        cause = str(error).partition("\n")[0].partition(" <")[0]
        raise ValueError(cause or type(error).__name__) from None
    if pixels.shape[:2] != (SIDE, SIDE):
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels instead of {SIDE} x {SIDE}")
    return pixels.transpose(2, 0, 1)


def _arrays(place: Path, layout: Layout) -> Arrays:
    """The arrays of an npz, its images made `(n, channels, height, width)`."""
    try:
        with np.load(place, allow_pickle=False) as file:
            found = {f"{kind}_{split}": file[f"{kind}_{split}"] for kind in "xy" for split in SPLITS}
    except KeyError as error:
        raise BadInput(f"{place}: {error.args[0]}; it needs x_train, y_train, x_test and y_test") from None
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise BadInput(f"{place}: not a whole npz file: {error}: get it again") from None
    for split in SPLITS:
        images, labels = found[f"x_{split}"], found[f"y_{split}"].reshape(-1)
        if images.dtype != np.uint8 or images.shape != (len(labels), SIDE, SIDE, 3):
            raise BadInput(
                f"{place}: x_{split} is {images.dtype} {images.shape}, not uint8 ({len(labels)}, 32, 32, 3)"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < layout.classes:
            raise BadInput(f"{place}: y_{split} has labels outside 0 to {layout.classes - 1}")
        found |= {f"x_{split}": images.transpose(0, 3, 1, 2), f"y_{split}": labels.astype(np.int64)}
    numbers = [str(number) for number in range(layout.classes)]
    return {
        **found,
        "classes": np.array(numbers),
        "skipped": np.array([], np.str_),
        "pictures": np.array(False),
    }


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
