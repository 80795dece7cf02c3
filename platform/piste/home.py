"""Where piste keeps what it makes: ledger, runs, caches and the default MLflow store."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder of `PISTE_HOME`, or `.piste` in the current folder."""
    return Path(os.environ.get("PISTE_HOME", ".piste")).absolute()


def keep(path: Path, text: str) -> None:
    """Writes a file whole or not at all, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
