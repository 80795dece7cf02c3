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

__all__ = ["RunResult", "load_recipe", "rerun", "resume", "run"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `piste --help` imports neither torch nor SQLAlchemy.
    if name in __all__:
        return getattr(import_module("piste.running"), name)
    raise AttributeError(f"module 'piste' has no attribute {name!r}")
