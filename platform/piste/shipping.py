"""What a job takes along: the source packages and the user's folder, addressed by their content."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from piste import catalog
from piste.errors import BadInput

UPLOAD_LIMIT = 100 * 2**20
SKIPPED = {"__pycache__", "venv", "node_modules"}


@dataclass(frozen=True)
class Shipment:
    """Folders to be sent.

    Attributes:
        modules: Each becomes importable under its own name.
        folder: The name of the user's, whose modules become importable too.
        content: sha256 over the names and bytes of all files.
    """

    modules: tuple[Path, ...]
    folder: str | None
    content: str


def pack(folder: Path | None, target: Path) -> Shipment:
    """Copies what is to be sent.

    Args:
        folder: The user's folder.
        target: An empty folder for the copies.

    Raises:
        BadInput: The user's folder does not exist, or is over the limit; its largest files are named.
    """
    content = _content(sources := _sources(folder))
    for name, source in sources.items():
        for path in files(source):
            copy = target / name / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    modules = tuple(target / name for name in sources)
    return Shipment(modules, folder.resolve().name if folder is not None else None, content)


def content(folder: Path | None) -> str:
    """sha256 over the names and bytes of all files that would be sent.

    Raises:
        BadInput: As `pack`.
    """
    return _content(_sources(folder))


def _content(sources: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, source in sources.items():
        for path in files(source):
            relative = path.relative_to(source).as_posix()
            digest.update(f"{name}/{relative}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(folder: Path | None) -> dict[str, Path]:
    """The folders that are sent, by the names under which they become importable."""
    sources = {name: _package(name) for name in ("piste", *catalog.packages())}
    if folder is not None:
        name = folder.resolve().name
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder")
        if name in sources:
            raise BadInput(f"{folder}: a folder of the name {name!r} would hide that package: rename it")
        check_size(folder)
        sources[name] = folder
    return sources


def files(folder: Path) -> Iterator[Path]:
    """The files of a folder that are sent, in sorted order: no hidden ones, caches or environments."""
    for root, folders, names in os.walk(folder):
        kept = sorted(n for n in folders if not n.startswith(".") and n not in SKIPPED)
        folders[:] = [n for n in kept if not (Path(root) / n / "pyvenv.cfg").exists()]
        yield from (Path(root) / n for n in sorted(names) if not n.startswith(".") and _sent(Path(root) / n))


def _sent(path: Path) -> bool:
    return path.is_file() and path.suffix != ".pyc"


def check_size(folder: Path) -> None:
    """Refuses a folder that is too large to be sent with every job.

    Raises:
        BadInput: It is over the limit.
    """
    sizes = {path: path.stat().st_size for path in files(folder)}
    if (total := sum(sizes.values())) <= UPLOAD_LIMIT:
        return
    largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
    named = ", ".join(f"{path.relative_to(folder)} ({_mib(sizes[path])})" for path in largest)
    raise BadInput(
        f"{folder}: {_mib(total)} are too much to send, the limit is {_mib(UPLOAD_LIMIT)}; largest: {named}: "
        "move data to storage that the cluster shares, or name another --folder"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _package(name: str) -> Path:
    """Where a package's files are.

    Raises:
        BadInput: It is not a folder of Python files.
    """
    spec = importlib.util.find_spec(name)
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    if len(locations) != 1:
        raise BadInput(f"package {name!r} cannot be sent: it is not one folder of Python files")
    return Path(locations[0])
