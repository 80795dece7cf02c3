"""The recipe of a workload's own `test_settings`, with what they need on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.workloads.tiny_llama import save_tiny_llama
from tests.workloads.tiny_poses import save_npz

from piste import catalog
from piste.config import Recipe, override
from piste.running import resolve

SMALL_TEXT = "".join(f"{n} times {n} is {n * n}, and that was line {n}.\n" for n in range(200))


def _save_text(path: Path) -> Path:
    path.write_text(SMALL_TEXT, encoding="utf-8")
    return path


# What a value of `test_settings` may ask for: `{text}` is the path of a small text file, and so on.
PLACES: dict[str, Callable[[Path], Path]] = {
    "text": _save_text,
    "poses": lambda path: save_npz(path.with_suffix(".npz")),
    "model": save_tiny_llama,
}


def small_recipe(name: str, folder: Path) -> Recipe:
    """The configuration of a workload's `test_settings`; what they name in braces is made in `folder`."""
    module = catalog.load_workload(name)
    assert hasattr(module, "test_settings"), f"{module.__name__} must declare test_settings"
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(module.test_settings)
    for key, value in settings.items():
        for place, save in PLACES.items():
            if value == f"{{{place}}}":
                settings[key] = str(save(folder / place))
    return resolve(override({}, settings | {"tracking.system_metrics": False, "workload": name}), name)
