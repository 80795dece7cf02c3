"""Data that installed packages bring along."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

from piste.errors import BadInput


def version(name: str, package: str) -> str:
    """The version of the package that a data set comes in.

    Raises:
        BadInput: It is not installed.
    """
    try:
        return installed_version(package)
    except PackageNotFoundError:
        raise BadInput(f"data.name: {name} comes with {package}: pip install 'piste[images]'") from None


def module(name: str) -> Any:
    """Imports a module of a package that is installed, as late as it is needed."""
    return importlib.import_module(name)
