"""The log-likelihood of rows that are not learned from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from piste.workload import Run
from piste_algorithms.circuits import Circuit
from piste_workloads.circuits.progress import likelihoods
from piste_workloads.circuits.rows import Encoding, Rows
from piste_workloads.llm.tokens import Tokenizer

ROWS = 4096  # that are evaluated as one


class Held:
    """The rows of a part, and what its metrics need of them.

    Attributes:
        part: `valid` or `test`.
        rows: `(rows, variables)`.
        encoding: What they mean.
        bytes: Of text that they stand for; None where they are not tokens.
    """

    def __init__(self, part: str, rows: Rows, device: torch.device) -> None:
        self.part, self.encoding = part, rows.encoding
        self.rows = rows.parts[part].to(device)
        self.bytes: int | None = None
        if self.encoding.kind == "tokens":
            lengths = Tokenizer(self.encoding.tokenizer).bytes_of
            self.bytes = int(lengths[rows.parts[part].numpy()].sum())


def evaluate(circuit: Circuit, run: Run, held: Held) -> dict[str, float]:
    """The metrics of a part, its rows shared out over the workers: a collective of all ranks."""
    mine = run.shard(held.rows)  # type: ignore[type-var]
    total, right = 0.0, 0.0
    for x in torch.split(mine, ROWS) if len(mine) else ():
        total += float(circuit.log_likelihood(x).double().sum())
        if held.encoding.label:
            right += float((label_probabilities(circuit, held.encoding, x).argmax(1) == x[:, -1]).sum())
    rows = len(held.rows)
    log_likelihood = run.mean(total) * run.world_size / rows
    metrics = likelihoods(held.part, log_likelihood, float((held.rows >= 0).sum()) / rows)
    if held.bytes is not None:
        metrics[f"{held.part}/bits_per_byte"] = -log_likelihood * rows / (held.bytes * math.log(2.0))
    if held.encoding.label:
        metrics[f"{held.part}/accuracy"] = run.mean(right) * run.world_size / rows
    return metrics


def label_probabilities(circuit: Circuit, encoding: Encoding, x: Tensor) -> Tensor:
    """p(label | the other variables), `(rows, label)`; the label, the last variable of `x`, is not used."""
    joint = []
    for label in range(encoding.label):
        labelled = x.clone()
        labelled[:, -1] = label
        joint.append(circuit.log_likelihood(labelled))
    # p(y | x) = p(x, y) / sum_y p(x, y)
    return torch.stack(joint, 1).softmax(1)
