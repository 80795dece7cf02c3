"""FASTA: named sequences of bases, A, C, G and T as 0 to 3 and all else as missing."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from piste.errors import BadInput

BASES = "ACGT"
COMPLEMENT = np.array([3, 2, 1, 0, -1])  # of 0 to 3 and, as the last, of -1
LINE = 70  # bases on a written line

_CODES = np.full(256, -1, dtype=np.int64)
for _number, _base in enumerate(BASES):
    _CODES[[ord(_base), ord(_base.lower())]] = _number


class Sequences(NamedTuple):
    """What a FASTA file holds.

    Attributes:
        records: By name (the first word behind `>`), bases as 0 to 3, -1 where missing.
        others: How often each letter other than A, C, G, T and N occurs; upper case.
    """

    records: dict[str, NDArray[np.int64]]
    others: dict[str, int]

    def told(self) -> str:
        """The other letters in words; empty where there are none."""
        if not self.others:
            return ""
        letters = ", ".join(f"{count} {letter}" for letter, count in sorted(self.others.items()))
        return f"letters beyond ACGTN count as missing: {letters}"


def encode(letters: bytes) -> NDArray[np.int64]:
    """Bases as numbers; lower case is the same, all else -1."""
    return _CODES[np.frombuffer(letters, dtype=np.uint8)]


def reverse_complement(bases: NDArray[np.int64]) -> NDArray[np.int64]:
    """The other strand, in its own direction."""
    return COMPLEMENT[bases[::-1]]


def read(path: Path, what: str) -> Sequences:
    """Reads a FASTA file, plain or compressed with gzip.

    Args:
        path: The file.
        what: What to call it in a message.

    Raises:
        BadInput: It cannot be read, is no FASTA, or holds no base at all.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise BadInput(f"{what}: {path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(
            f"{what}: {path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    return parse(content, f"{what}: {path}")


def parse(content: bytes, what: str) -> Sequences:
    """Reads the content of a FASTA file; errors as `read`."""
    head, *parts = (b"\n" + content.replace(b"\r", b"")).split(b"\n>")
    if head.strip() or not parts:
        raise BadInput(f"{what}: no FASTA: a sequence begins with a line `>NAME`")
    records: dict[str, NDArray[np.int64]] = {}
    letters: Counter[str] = Counter()
    for number, part in enumerate(parts, start=1):
        title, _, lines = part.partition(b"\n")
        name = (title.decode("utf-8", "replace").split() or [f"sequence-{number}"])[0]
        if name in records:
            raise BadInput(f"{what}: two sequences are named {name}: rename one")
        bases = b"".join(lines.split())
        if not bases:
            raise BadInput(f"{what}: the sequence {name} is empty: remove it")
        codes = np.bincount(np.frombuffer(bases.upper(), dtype=np.uint8), minlength=256)
        letters.update({chr(code): int(codes[code]) for code in np.flatnonzero(codes)})
        records[name] = encode(bases)
    others = {letter: count for letter, count in letters.items() if letter not in "ACGTN"}
    return Sequences(records, others)


def compressed(content: str) -> bytes:
    """FASTA as gzip writes it, the same bytes whenever."""
    return gzip.compress(content.encode(), mtime=0)


def write(records: Iterable[tuple[str, NDArray[np.int64]]]) -> str:
    """Sequences as FASTA; a missing base is N."""
    lines = []
    for name, bases in records:
        text = "".join(np.array([*BASES, "N"])[bases])
        lines += [f">{name}", *(text[start : start + LINE] for start in range(0, len(text), LINE))]
    return "\n".join(lines) + "\n"
