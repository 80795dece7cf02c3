"""A platform for experiments on gradient-descent algorithms.

>>> import piste
>>> result = piste.run("llm-reg", local=True, optimizer__lr=3e-3)   # doctest: +SKIP
>>> result.metrics["valid/loss"]                                    # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from piste.running import RunResult, load_recipe, rerun, resume, run
    from piste.studies import study
    from piste.sweeping import SweepResult, resume_sweep, sweep
    from piste.verdicts import Verdict

_HOMES = {
    "piste.running": ("RunResult", "load_recipe", "rerun", "resume", "run"),
    "piste.studies": ("study",),
    "piste.sweeping": ("SweepResult", "resume_sweep", "sweep"),
    "piste.verdicts": ("Verdict",),
}
__all__ = [
    "RunResult",
    "SweepResult",
    "Verdict",
    "load_recipe",
    "rerun",
    "resume",
    "resume_sweep",
    "run",
    "study",
    "sweep",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `piste --help` imports neither torch nor SQLAlchemy.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'piste' has no attribute {name!r}")
