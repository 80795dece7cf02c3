"""Arrays that were long in the making, kept between runs."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from piste.home import home
from piste_workloads.data._dataset import Arrays

FORMAT = 1  # raised when the same source would give other arrays


def cached(key: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of a source, made by one process while the others wait.

    Args:
        key: Names the source and its version; another content needs another key.
        make: Makes the arrays.
    """
    name = re.sub(r"[^\w.-]", "-", key)
    path = home() / "cache" / "images" / f"{name}-{FORMAT}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _write(path, make())
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _write(path: Path, arrays: Arrays) -> None:
    """Writes arrays beside their place and renames them into it: whole or absent, whoever is killed when."""
    content: Any = dict(arrays)  # its keys are not among savez's own
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
