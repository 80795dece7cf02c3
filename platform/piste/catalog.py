"""Names to members, lazily.

A member is a file: `optimizers/reg.py` is the optimizer `reg`, `llm/` the workload `llm`,
`recipes/llm-reg.toml` the recipe `llm-reg`, `studies/m_fisher.py` the study `m-fisher`. Packages are
scanned as files and their docstrings read with `ast`; nothing is imported until a member is asked for.
A third party's package joins through an entry point of the group `piste.members` that names the
package, with `optimizers`, `workloads`, `recipes` and `studies` inside; a dotted path
(`my_project.losses`) works without one.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from piste.errors import BadInput, nearest

KINDS = ("workloads", "optimizers", "recipes", "studies")
_ONE = {"studies": "study"}


@dataclass(frozen=True)
class Member:
    """Something that the catalog found.

    Attributes:
        name: Its name on the command line.
        module: The dotted name of its module, or the package that holds a recipe.
        path: Its file.
        summary: The first line of its docstring (of a recipe: of its leading comment).
    """

    name: str
    module: str
    path: Path
    summary: str


@cache
def packages() -> tuple[str, ...]:
    """The packages that hold members: piste's own, then those of other distributions."""
    found = ["piste_algorithms", "piste_workloads"]
    found += sorted(point.value for point in entry_points(group="piste.members"))
    return tuple(dict.fromkeys(found))


@cache
def members(kind: str) -> dict[str, Member]:
    """All members of a kind, by name.

    Args:
        kind: One of `KINDS`.
    """
    found: dict[str, Member] = {}
    for package in packages():
        scan = _recipes if kind == "recipes" else _modules
        for member in scan(package, kind):
            found.setdefault(member.name, member)
    return dict(sorted(found.items()))


def find(kind: str, name: str) -> Member:
    """The member of that name.

    Raises:
        BadInput: There is none; the message names the nearest.
    """
    known = members(kind)
    if name not in known:
        one = _ONE.get(kind, kind.removesuffix("s"))
        raise BadInput(f"unknown {one} {name!r}{nearest(name, known)}")
    return known[name]


def load_workload(name: str) -> ModuleType:
    """Imports a workload by name or dotted path.

    Raises:
        BadInput: It is unknown, or lacks `Config` or `train`.
    """
    module = _import(name) if "." in name else importlib.import_module(find("workloads", name).module)
    for part in ("Config", "train"):
        if not hasattr(module, part):
            raise BadInput(f"workload {name!r}: {module.__name__} has no {part!r}")
    return module


def load_optimizer(name: str) -> type[Any]:
    """Imports an optimizer class: a member, a class of `torch.optim` (in any case), or a dotted path.

    Raises:
        BadInput: There is no such optimizer; the message names the nearest.
    """
    import torch

    if "." in name:
        module, _, attribute = name.rpartition(".")
        if not hasattr(loaded := _import(module), attribute):
            raise BadInput(f"optimizer {name!r}: {module} has no {attribute!r}")
        found = getattr(loaded, attribute)
        if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
            raise BadInput(f"optimizer {name!r} is not a torch.optim.Optimizer")
        return found
    if name in members("optimizers"):
        return member_class(importlib.import_module(members("optimizers")[name].module))
    classes = _torch_optimizers()
    if name.lower() not in classes:
        raise BadInput(f"unknown optimizer {name!r}{nearest(name, {*members('optimizers'), *classes})}")
    return classes[name.lower()]


@cache
def _torch_optimizers() -> dict[str, type[Any]]:
    import torch

    classes = {c.__name__.lower(): c for c in vars(torch.optim).values() if inspect.isclass(c)}
    return {n: c for n, c in classes.items() if issubclass(c, torch.optim.Optimizer) and n != "optimizer"}


def member_class(module: ModuleType) -> type[Any]:
    """The one optimizer class that a member's module defines.

    Raises:
        BadInput: It defines none, or more than one.
    """
    import torch

    defined = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer) and c.__module__ == module.__name__
    ]
    if len(defined) != 1:
        raise BadInput(
            f"{module.__name__} defines {len(defined)} torch.optim.Optimizer classes instead of one"
        )
    return defined[0]


def _import(module: str) -> ModuleType:
    if (folder := unpacked_folder()) is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BadInput(f"{module!r} cannot be imported: no module named {error.name!r}") from None


def unpacked_folder() -> Path | None:
    """Inside a job: where the user's folder lies on this host, whose modules are importable too."""
    name = os.environ.get("PISTE_FOLDER")
    if name is None:
        return None
    return next((Path(p) / name for p in sys.path if (Path(p) / name).is_dir()), None)


def _locations(package: str) -> list[str]:
    """The folders of a package, without importing it (its parents are imported)."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return []
    return list(spec.submodule_search_locations or []) if spec else []


def _modules(package: str, kind: str) -> Iterator[Member]:
    # piste's own workloads stand at the top of their package, beside `recipes` and `studies`.
    home = package if (package, kind) == ("piste_workloads", "workloads") else f"{package}.{kind}"
    for folder in _locations(home):
        for info in pkgutil.iter_modules([folder]):
            path = Path(folder) / (f"{info.name}/__init__.py" if info.ispkg else f"{info.name}.py")
            if info.name.startswith("_") or not path.exists():
                continue
            name = info.name.replace("_", "-") if kind == "studies" else info.name
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError as error:  # one broken file must not hide the others
                summary = f"cannot be parsed: {error.msg} (line {error.lineno})"
                yield Member(name, f"{home}.{info.name}", path, summary)
                continue
            if kind == "workloads" and "train" not in _bound(tree):
                continue
            summary = (ast.get_docstring(tree) or "").partition("\n")[0]
            yield Member(name, f"{home}.{info.name}", path, summary)


def _bound(tree: ast.Module) -> set[str]:
    """The names that a module's functions and imports bind."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def _recipes(package: str, kind: str) -> Iterator[Member]:
    for folder in _locations(package):
        for path in sorted((Path(folder) / kind).glob("*.toml")):
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            yield Member(path.stem, package, path, first.removeprefix("#").strip())


def recipe_path(name_or_path: str | Path) -> Path:
    """Where a recipe is: a file's own path, or the member of that name.

    Raises:
        BadInput: Neither exists; the message names the nearest recipe.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.exists() or "/" in str(name_or_path):
        return path
    return find("recipes", str(name_or_path)).path


def recipe_workload(table: dict[str, Any], source: str) -> str:
    """The workload that a recipe's table names.

    Raises:
        BadInput: It names none.
    """
    name = table.get("workload")
    if not isinstance(name, str):
        raise BadInput(f'{source}: workload is missing: add `workload = "NAME"`')
    return name
