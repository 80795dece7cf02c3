"""Checkpoints: complete or absent, verified when they are read, kept by the recipe's policy.

A checkpoint is a folder `step-000000100` with one file a rank and a manifest of their sizes and
sha256. It is written beside its place and renamed into it, so that a killed process leaves either a
whole checkpoint or none; a damaged one is passed over for the one before, which is said.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from piste.errors import PisteError

MANIFEST = "manifest.json"


class CheckpointError(PisteError):
    """A checkpoint that cannot be written, read or loaded into this model."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: Their folder, on storage that all workers share.
        keep: The recipe's policy: `"last N"`, `"all"` or `"trajectory N"` (which keeps all that it is
            given: the recipe spaces them).
    """

    def __init__(self, directory: Path, keep: str = "last 2") -> None:
        self.directory = directory
        self._keep = int(keep.split()[1]) if keep.startswith("last") else None

    def write(self, step: int, rank: int, state: Mapping[str, Any]) -> None:
        """Writes one rank's part of the checkpoint of `step`; not visible before `commit`.

        Raises:
            CheckpointError: It cannot be written (a full or read-only disk).
        """
        partial = self._partial(step)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            with (partial / f"rank-{rank}.pt").open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(_unwritable(partial, error)) from error

    def commit(self, step: int) -> dict[str, Any]:
        """Makes the checkpoint of `step` visible once all ranks have written, and removes old ones.

        Returns:
            Its record for the ledger, as columns of `ledger.Artifact`.
        """
        partial, final = self._partial(step), self.path(step)
        try:
            files = {p.name: _fingerprint(p) for p in sorted(partial.glob("rank-*.pt"))}
            (partial / MANIFEST).write_text(json.dumps(files, indent=1))
            shutil.rmtree(final, ignore_errors=True)  # the same step, computed again after a resume
            partial.rename(final)
        except OSError as error:
            raise CheckpointError(_unwritable(partial, error)) from error
        for old in self.steps()[: -self._keep] if self._keep else ():
            shutil.rmtree(self.path(old), ignore_errors=True)
        return {
            "kind": "checkpoint",
            "name": final.name,
            "uri": str(final),
            "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
            "size": sum(size for size, _ in files.values()),
            "step": step,
        }

    def steps(self) -> list[int]:
        """The steps of all visible checkpoints, ascending."""
        return sorted(int(p.name.removeprefix("step-")) for p in self.directory.glob("step-*"))

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of `step`."""
        return self.directory / f"step-{step:09d}"

    def latest(
        self, rank: int = 0, say: Callable[[str], None] = warnings.warn
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The newest undamaged checkpoint: rank 0's state and this rank's own, or None.

        A rank that the checkpoint lacks (the world has grown) gets an empty state of its own.

        Args:
            rank: The rank whose state is read.
            say: Called with a line for every checkpoint that is passed over.
        """
        for step in reversed(self.steps()):
            folder = self.path(step)
            damage = _damage(folder)
            if damage:
                before = [each for each in self.steps() if each < step]
                where = f"checkpoint {self.path(before[-1]).name}" if before else "the start"
                say(f"checkpoint {folder.name} is damaged ({damage}): falling back to {where}")
                continue
            own = folder / f"rank-{rank}.pt"
            shared = load(folder)
            if rank == 0:
                return shared, shared
            return shared, _load_file(own) if own.exists() else {}
        return None

    def _partial(self, step: int) -> Path:
        return self.directory / f".partial-{step:09d}"


def load(folder: Path) -> dict[str, Any]:
    """Rank 0's state of a checkpoint folder, on the CPU.

    Raises:
        CheckpointError: It is missing or not a checkpoint.
    """
    return _load_file(folder / "rank-0.pt")


def load_model(model: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Loads a model's state, naming the first thing that does not fit.

    Raises:
        CheckpointError: A parameter is missing, left over or of another shape.
    """
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise CheckpointError(f"{source}: another architecture: it has no {name!r}")
        if state[name].shape != tensor.shape:
            there, here = tuple(state[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"{source}: another architecture: {name!r} is {there} there, {here} here")
    for name in state:
        if name not in wanted:
            raise CheckpointError(f"{source}: another architecture: {name!r} has no place in this model")
    model.load_state_dict(dict(state))


def _load_file(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not a checkpoint"
        raise CheckpointError(f"checkpoint {path}: {reason}") from error
    return state


def _fingerprint(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty where nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return "no readable manifest"
    for name, expected in files.items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if _fingerprint(folder / name) != tuple(expected):
            return f"{name} has changed since it was written"
    return ""


def _unwritable(path: Path, error: Exception) -> str:
    # torch's writer hides the file's own error behind one about positions.
    system = error if isinstance(error, OSError) else error.__context__
    cause = system.strerror if isinstance(system, OSError) else str(error).partition("\n")[0]
    return f"checkpoint {path} cannot be written: {cause}: free space or set PISTE_HOME, then `piste resume`"
