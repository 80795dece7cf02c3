"""Circuits as safetensors files: the tables as tensors, the structure as JSON in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from piste_algorithms.circuits.structure import Structure, from_json, to_json

FORMAT = "piste-circuit"
VERSION = "1"


def save(structure: Structure, tables: Mapping[str, Tensor], path: Path) -> None:
    """Write a circuit."""
    metadata = {"format": FORMAT, "version": VERSION, "structure": json.dumps(to_json(structure))}
    save_file({name: table.contiguous() for name, table in tables.items()}, path, metadata)


def load(path: Path) -> tuple[Structure, dict[str, Tensor]]:
    """Read a circuit's structure and tables.

    Raises:
        ValueError: if the file is no circuit, of another version of the format, or broken.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is a safetensors file, but no circuit of piste")
            if metadata.get("version") != VERSION:
                raise ValueError(
                    f"{path} is a circuit of format version {metadata.get('version')!r}, this code reads "
                    f"{VERSION!r}: load it with the version of piste that wrote it, or build it again"
                )
            structure = from_json(json.loads(metadata["structure"]))
            return structure, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no circuit of piste, or broken: {error}") from error
