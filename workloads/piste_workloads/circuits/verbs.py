"""What a trained circuit can be asked: the verbs `score`, `sample`, `impute` and `save`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from piste.checkpoints import load
from piste.errors import BadInput
from piste_algorithms.circuits import Circuit
from piste_workloads.circuits import files, tables
from piste_workloads.circuits.config import Config
from piste_workloads.circuits.evaluation import ROWS, label_probabilities
from piste_workloads.circuits.rows import Encoding
from piste_workloads.circuits.spelling import spell
from piste_workloads.circuits.train import answering

METHODS = ("sample", "most-probable")


def score(
    config: Config, checkpoint: Path, input: str = "", output: str = "", missing: str = "_"
) -> dict[str, Any]:
    """The log-likelihood of each row of a file, missing values summed out.

    Args:
        config: The recipe of the run that made the checkpoint.
        checkpoint: The checkpoint's folder.
        input: FASTA, text, CSV, Parquet or NPY, by how its name ends; a sequence is scored in windows of the
            circuit's length that follow each other.
        output: CSV, Parquet or NPY (the log-likelihoods alone); empty: the scores are in the answer.
        missing: In a text, stands for a missing character.

    Returns:
        `rows`, `log_likelihood` (mean, nats a row), `bits_per_dimension` (of the observed values), `note` on
        what was read otherwise than it is written, and `scores`: for each row `row`, `start` (in its
        sequence), `observed` (values), `log_likelihood`, `bits_per_dimension` (None where nothing is
        observed), and for labelled rows `label_0`, `label_1`, the labels' probabilities; or `output`, the
        file that has them.

    Raises:
        BadInput: The file cannot be read or written, or has other columns or categories than the circuit.
        CheckpointError: There is no checkpoint, or of another version.
    """
    circuit, encoding = _open(checkpoint)
    target = Path(output).expanduser()
    if output and not target.name.lower().endswith(tables.SUFFIXES):
        raise BadInput(
            f"output: {output}: scores are written to a file that ends in {', '.join(tables.SUFFIXES)}"
        )
    given = files.read(Path(input).expanduser(), encoding, missing)
    found = torch.cat([circuit.log_likelihood(x) for x in torch.split(given.x, ROWS)]).double()
    observed = (given.x >= 0).sum(1)
    columns: dict[str, list[Any]] = {
        "row": given.names,
        "start": given.starts,
        "observed": observed.tolist(),
        "log_likelihood": found.tolist(),
        "bits_per_dimension": [_bits(*pair) for pair in zip(found.tolist(), observed.tolist(), strict=True)],
    }
    if encoding.label:
        probabilities = label_probabilities(circuit, encoding, given.x)
        columns |= {f"label_{label}": probabilities[:, label].tolist() for label in range(encoding.label)}
    answer: dict[str, Any] = {
        "rows": len(found),
        "log_likelihood": float(found.mean()),
        "bits_per_dimension": _bits(float(found.sum()), int(observed.sum())),
        "note": given.note,
    }
    if not output:
        names = list(columns)
        return answer | {
            "scores": [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        }
    try:
        if target.name.lower().endswith(".npy"):
            np.save(target, found.numpy())
        else:
            tables.write(target, columns)
    except OSError as error:
        raise BadInput(f"output: {output}: cannot be written: {error.strerror}") from None
    return answer | {"output": str(target)}


def sample(
    config: Config, checkpoint: Path, count: int = 10, seed: int = 0, output: str = ""
) -> dict[str, Any]:
    """Draws rows.

    Args:
        config: The recipe of the run that made the checkpoint.
        checkpoint: The checkpoint's folder.
        count: How many.
        seed: Of the draws.
        output: FASTA, text, CSV, Parquet or NPY, by how its name ends; empty: they are in the answer.

    Returns:
        `rows`, and `samples`, each in writing, or `output`, the file that has them.

    Raises:
        BadInput: `count` is below 1; the file cannot be written.
        CheckpointError: There is no checkpoint, or of another version.
    """
    if count < 1:
        raise BadInput(f"sample: count = {count} must be at least 1")
    circuit, encoding = _open(checkpoint)
    x = circuit.sample(count, torch.Generator().manual_seed(seed))
    if not output:
        return {"rows": count, "samples": spell(x, encoding)}
    files.write(Path(output).expanduser(), x, encoding)
    return {"rows": count, "output": output}


def impute(
    config: Config,
    checkpoint: Path,
    input: str = "",
    output: str = "",
    method: str = "sample",
    seed: int = 0,
    missing: str = "_",
) -> dict[str, Any]:
    """Completes the missing values of a file's rows.

    Args:
        config: The recipe of the run that made the checkpoint.
        checkpoint: The checkpoint's folder.
        input: FASTA (N is missing), text, CSV, Parquet or NPY, by how its name ends; sequences are completed
            in windows of the circuit's length that follow each other, and keep their lengths.
        output: A file of any of these kinds; empty: the rows are in the answer.
        method: `sample` draws from the distribution given the observed values; `most-probable` takes the most
            probable joint choice of missing values and hidden states.
        seed: Of the draws.
        missing: In a text, stands for a missing character.

    Returns:
        `rows`, `imputed` (how many values), `note` on what was read otherwise than it is written, and
        `completed`, each sequence or row in writing, or `output`, the file that has them.

    Raises:
        BadInput: As `score`; nothing is missing; the observed part of a row has probability zero.
        CheckpointError: There is no checkpoint, or of another version.
    """
    if method not in METHODS:
        raise BadInput(f"impute: method = {method!r} must be {' or '.join(METHODS)}")
    circuit, encoding = _open(checkpoint)
    if output:
        files.suffix(Path(output), encoding, "output")
    given = files.read(Path(input).expanduser(), encoding, missing)
    holes = given.x < 0
    for row, (name, start) in enumerate(zip(given.names, given.starts, strict=True)):
        if given.lengths:  # what lies behind a sequence's end, and its label, is not in the file
            holes[row, min(given.lengths[name] - start, encoding.shape[0]) :] = False
    if not bool(holes.any()):
        raise BadInput(
            f"input: {input}: nothing is missing in it: mark it (FASTA: N, text: {missing}, else: -1)"
        )
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for x in torch.split(given.x, ROWS):
        try:
            parts.append(circuit.conditional_sample(x, generator) if method == "sample" else circuit.mpe(x))
        except ValueError as error:
            raise BadInput(f"input: {input}: {error}") from error
    completed = torch.cat(parts)
    answer: dict[str, Any] = {"rows": len(completed), "imputed": int(holes.sum()), "note": given.note}
    if not output:
        return answer | {"completed": files.spelled(completed, encoding, given)}
    files.write(Path(output).expanduser(), completed, encoding, given)
    return answer | {"output": output}


def save(config: Config, checkpoint: Path, output: str = "circuit.safetensors") -> dict[str, Any]:
    """Writes the circuit to a file that `piste_algorithms.circuits.Circuit.load` and `[model]` read.

    Args:
        config: The recipe of the run that made the checkpoint.
        checkpoint: The checkpoint's folder.
        output: The file.

    Returns:
        `output`, and `variables`.

    Raises:
        BadInput: The file cannot be written.
        CheckpointError: There is no checkpoint, or of another version.
    """
    circuit, _ = _open(checkpoint)
    path = Path(output).expanduser()
    if not path.parent.is_dir():
        raise BadInput(f"output: {output}: there is no folder {path.parent}")
    circuit.save(path)
    return {"output": str(path), "variables": circuit.variables}


def _open(checkpoint: Path) -> tuple[Circuit, Encoding]:
    state = load(checkpoint)
    return answering(state), Encoding.of(state["encoding"])


def _bits(log_likelihood: float, observed: int) -> float | None:
    """The negative log-likelihood in bits, for each of the observed values."""
    # bits per dimension = -log p(x) / (D ln 2)
    return -log_likelihood / (observed * math.log(2.0)) if observed else None
