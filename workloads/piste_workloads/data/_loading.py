"""`load`: a data set by its name, from where it is to be had."""

from __future__ import annotations

import importlib
import os
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from piste.errors import BadInput, nearest
from piste_workloads.data._dataset import Dataset

SOURCES = ("auto", "local", "bundled", "hub")
SPLITS = (None, "train", "test")
FOLDER = "PISTE_DATA"  # the environment variable


@cache
def names() -> tuple[str, ...]:
    """The data sets that there are."""
    folder = str(Path(__file__).parent)
    return tuple(info.name for info in pkgutil.iter_modules([folder]) if not info.name.startswith("_"))


def sizes(name: str) -> dict[str, int]:
    """How many examples the splits of a data set have, without loading it.

    Raises:
        BadInput: There is no such data set.
    """
    return dict(_module(name).SIZES)


def load(
    name: str,
    source: str = "auto",
    root: str | Path | None = None,
    split: str | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> Dataset:
    """Loads a data set.

    Args:
        name: A module of this package: `cifar10`, `cifar100`, `digits`, `mnist5k`, `photo_patches`.
        source: `local`: a file or folder, given by `root` or the environment variable PISTE_DATA;
            `bundled`: an installed package; `hub`: the Hugging Face hub, the only one that uses the network;
            `auto`: `local` where there is one, else `bundled`.
        root: The file, or the folder in which it lies, alone or in a folder of the data set's name.
        split: `train`, `test`, or None for both.
        seed: Of the split and of the drawn patches, for data sets that come without a split of their own.
        skip_bad: Leave out members of an archive that cannot be read; they are named in `meta.skipped`.

    Raises:
        BadInput: An unknown name, source or split; the data are not there, or damaged. The message says what
            to install or where to put them.
    """
    module = _module(name)
    if source not in SOURCES:
        raise BadInput(f"data.source: unknown source {source!r}{nearest(source, SOURCES)}")
    if split not in SPLITS:
        raise BadInput(f"split = {split!r} must be 'train', 'test' or None")
    place = None if source in {"bundled", "hub"} else _place(module, name, root)
    if place is not None:
        return _checked(module.local(place, split, skip_bad))
    if source == "hub" and hasattr(module, "hub"):
        return _checked(module.hub(split))
    if source in {"auto", "bundled"} and hasattr(module, "bundled"):
        return _checked(module.bundled(split, seed))
    raise BadInput(_absent(module, name, source))


def _module(name: str) -> Any:
    if name not in names():
        raise BadInput(f"data.name: unknown data set {name!r}{nearest(name, names())}")
    return importlib.import_module(f"piste_workloads.data.{name}")


def _place(module: Any, name: str, root: str | Path | None) -> Path | None:
    """The file or folder that holds the data set, where there is one.

    Raises:
        BadInput: `root` was given and holds none.
    """
    given = root if root is not None else os.environ.get(FOLDER)
    if not given:
        return None
    if hasattr(module, "local"):
        folder = Path(given).expanduser()
        if folder.is_file():
            return folder
        for place in (base / each for base in (folder / name, folder) for each in module.PLACES):
            if place.exists():
                return Path(place)
    if root is None:
        return None
    if not hasattr(module, "local"):
        raise BadInput(f"data.root: {name} comes in a package, not as a file: leave root out")
    raise BadInput(f"data.root: {root}: no {name} there: it needs one of {', '.join(module.PLACES)}")


def _absent(module: Any, name: str, source: str) -> str:
    ways = []
    if hasattr(module, "local"):
        ways.append(f"set {FOLDER} (or data.root) to a folder that has {name}/{module.PLACES[0]}")
    if hasattr(module, "bundled"):
        ways.append('use source = "bundled"')
    if hasattr(module, "hub"):
        ways.append("use source = \"hub\" (pip install 'piste[hub]')")
    where = "" if source == "auto" else f' from source = "{source}"'
    return f"data.name: {name} is not to be had{where}: {', or '.join(ways)}"


def _checked(data: Dataset) -> Dataset:
    if len(data) == 0:
        raise BadInput(f"data: {data.meta.source}: no image of {data.meta.name} in it")
    return data
