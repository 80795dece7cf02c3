"""What files an archive or a folder holds, one after the other, without unpacking it."""

from __future__ import annotations

import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from piste.errors import BadInput


def members(place: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Some files of a tar archive (of any compression) or of a folder.

    Args:
        place: The archive or folder.
        wanted: Whether a file is wanted, by its path inside.

    Yields:
        The path inside and the content.

    Raises:
        BadInput: It cannot be read, or is damaged as a whole.
    """
    if place.is_dir():
        for path in sorted(place.rglob("*")):
            name = path.relative_to(place).as_posix()
            if wanted(name) and path.is_file():
                yield name, path.read_bytes()
        return
    try:
        with tarfile.open(place, "r:*") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if wanted(name) and (file := archive.extractfile(member)) is not None:
                    yield name, file.read()
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"{place}: not a whole tar archive: {cause}: get it again") from None


def fingerprint(place: Path) -> str:
    """The sha256 of a file.

    Raises:
        BadInput: It cannot be read.
    """
    try:
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{place}: cannot be read: {error.strerror}") from None
