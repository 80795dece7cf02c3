"""The circuit and the learning rule that a recipe names."""

from __future__ import annotations

from pathlib import Path

import torch

from piste.errors import BadInput
from piste_algorithms import circuits
from piste_algorithms.circuits import Circuit, LearningRule
from piste_algorithms.circuits.schedules import Schedule
from piste_workloads.circuits.config import (
    Adam,
    Anemone,
    Config,
    File,
    FullBatchEM,
    Hclt,
    Hmm,
    MiniBatchEM,
    OnlineEM,
    PoonDomingos,
    PoonDomingosTrees,
)
from piste_workloads.circuits.rows import Encoding, Rows, evenly
from piste_workloads.grokking.points import seeded


def build_circuit(config: Config, rows: Rows, seed: int) -> Circuit:
    """A circuit for the rows, with random parameters from the seed, or the one of a file.

    Raises:
        BadInput: The file is no circuit, of another version, or of other variables; a circuit of this kind
            cannot be made for these rows.
    """
    try:
        if isinstance(config.model, File):
            return _of_file(config.model.path, rows.encoding).to(dtype=_dtype(config))
        circuit = _random_circuit(config.model, rows, seed, _dtype(config))
        if rows.encoding.label:
            _limit_label(circuit, rows.encoding)
        return circuit
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"model: {error}") from error


def _of_file(path: Path, encoding: Encoding) -> Circuit:
    circuit = load_circuit(path, "model.path")
    found, wanted = circuit.structure.categories, (encoding.categories,) * encoding.variables
    if found != wanted:
        raise BadInput(
            f"model.path: {path}: a circuit of {len(found)} variables with up to {max(found)} categories, "
            f"and the data have {encoding.variables} with {encoding.categories}"
        )
    return circuit


def _random_circuit(
    model: Hmm | Hclt | PoonDomingos | PoonDomingosTrees, rows: Rows, seed: int, dtype: torch.dtype
) -> Circuit:
    encoding, generator = rows.encoding, seeded(seed, "parameters")
    if isinstance(model, Hmm):
        return circuits.hmm(
            encoding.variables,
            model.latents,
            encoding.categories,
            homogeneous=model.homogeneous,
            generator=generator,
            dtype=dtype,
        )
    if isinstance(model, PoonDomingos):
        return circuits.pd(
            encoding.array,
            model.latents,
            encoding.categories,
            split=model.split,
            max_cuts=model.max_cuts,
            generator=generator,
            dtype=dtype,
        )
    data = torch.from_numpy(evenly(rows.parts["train"].numpy(), model.tree_rows))
    if isinstance(model, Hclt):
        return circuits.hclt(
            data, model.latents, encoding.categories, bins=model.bins, generator=generator, dtype=dtype
        )
    return circuits.pdhclt(
        data,
        encoding.array,
        model.latents,
        encoding.categories,
        split=model.split,
        max_cuts=model.max_cuts,
        bins=model.bins,
        generator=generator,
        dtype=dtype,
    )


def _limit_label(circuit: Circuit, encoding: Encoding) -> None:
    """Takes from the label, where it has a table of its own, the categories that only the others have.

    A parameter that is zero stays zero, so that no label is sampled that there is not.
    """
    emission = circuit.parameters()["emission"]
    if emission.ndim == 3:
        emission[-1, :, encoding.label :] = 0.0
        emission[-1] /= emission[-1].sum(-1, keepdim=True)
        circuit.set_parameters({"emission": emission})


def load_circuit(path: Path, key: str) -> Circuit:
    """The circuit of a file.

    Raises:
        BadInput: It is not there, no circuit, or of another version of the format.
    """
    if not path.is_file():
        raise BadInput(f"{key}: {path}: no such file")
    try:
        return Circuit.load(path)
    except ValueError as error:
        raise BadInput(f"{key}: {error}") from error


def _dtype(config: Config) -> torch.dtype:
    return torch.float64 if config.train.dtype == "float64" else torch.float32


def build_rule(config: Config, circuit: Circuit, updates: int) -> LearningRule:
    """The rule that learns the circuit's parameters in so many updates."""
    rule = config.rule.settings
    if isinstance(rule, FullBatchEM):
        return circuits.FullBatchEM(circuit, rule.pseudocount)
    if isinstance(rule, OnlineEM):
        return circuits.OnlineEM(circuit, circuits.power_decay(rule.exponent), rule.pseudocount)
    if isinstance(rule, MiniBatchEM):
        return circuits.MiniBatchEM(circuit, _schedule(rule, rule.step_size, updates), rule.pseudocount)
    if isinstance(rule, Adam):
        return circuits.AdamCircuit(circuit, _schedule(rule, rule.lr, updates))
    return circuits.Anemone(
        circuit,
        _schedule(rule, rule.step_size, updates),
        momentum=rule.momentum,
        updates_every=rule.updates_every,
        pseudocount=rule.pseudocount,
    )


def _schedule(rule: MiniBatchEM | Anemone | Adam, step_size: float, updates: int) -> Schedule:
    """A flat part, then half a cosine down to a share of the step size; a constant where the share is 1."""
    if rule.minimum_ratio == 1.0:
        return lambda _: step_size
    flat = round(rule.flat_fraction * updates)
    return circuits.cosine_decay(step_size, flat, updates, rule.minimum_ratio * step_size)
