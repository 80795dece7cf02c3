"""What a person sees of a sweep: live progress, tables, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from piste.ledger import Ledger, TrialRecord
from piste.space import Sweep


def draw_all(ledger: Ledger, trials: Sequence[TrialRecord], section: Sweep, folder: Path) -> list[Path]:
    """Draws every picture that these trials allow into a folder."""
    return []
