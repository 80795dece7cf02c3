"""The rooms of the house: who may import whom, and what a bare import costs."""

from __future__ import annotations

import ast
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY = {"training.py", "tuning.py", "trial_process.py", "writer.py", "streaming.py", "clusters.py"}


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_the_standard_librarys_platform_is_not_shadowed() -> None:
    assert Path(platform.__file__).parent.samefile(sysconfig.get_path("stdlib"))
    assert platform.python_implementation() == sys.implementation.name.replace("cpython", "CPython")


@pytest.mark.parametrize("root", ["platform", "algorithms", "workloads"])
def test_a_source_root_holds_one_package_and_is_none_itself(root: str) -> None:
    assert not (ROOT / root / "__init__.py").exists()
    packages = [p.parent.name for p in (ROOT / root).glob("*/__init__.py")]
    assert packages == [{"platform": "piste"}.get(root, f"piste_{root}")]


@pytest.mark.parametrize(
    ("library", "allowed"),
    [("ray", RAY), ("mlflow", {"tracking.py", "sweep_tracking.py"}), ("sqlalchemy", {"ledger"})],
)
def test_one_room_alone_knows(library: str, allowed: set[str]) -> None:
    house = ROOT / "platform" / "piste"
    # The probe asks a cluster what there is, before anything of the house is there.
    files = [p for p in house.rglob("*.py") if library in imported(p) and p.name != "probe.py"]
    users = {p.relative_to(house).parts[0] for p in files}  # a module, or a room of several
    assert users, f"nothing imports {library}: this test looks in the wrong place"
    assert users <= allowed


def test_a_bare_import_is_light() -> None:
    heavy = "{'torch', 'ray', 'mlflow', 'sqlalchemy'}"
    script = f"import piste, piste.cli, sys; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
