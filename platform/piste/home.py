"""Where piste keeps what it makes: ledger, runs, caches and the default MLflow store."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder of `PISTE_HOME`, or `.piste` in the current folder."""
    return Path(os.environ.get("PISTE_HOME", ".piste")).absolute()
