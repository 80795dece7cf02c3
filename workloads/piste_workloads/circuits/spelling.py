"""Rows in writing: text, bases, or numbers."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from piste_workloads.circuits.fasta import BASES
from piste_workloads.circuits.rows import Encoding
from piste_workloads.llm.tokens import Tokenizer

GAP = "\N{LOW LINE}"  # a missing character of a text


def spell(x: Tensor, encoding: Encoding) -> list[str]:
    """Each row in writing; a missing character is `_`, a missing base N, a missing number `?`.

    Args:
        x: `(rows, variables)`, -1 where missing.
        encoding: What the categories mean.
    """
    rows = x.cpu().numpy()
    if encoding.kind == "tokens":
        return [_tokens(row.tolist(), Tokenizer(encoding.tokenizer)) for row in rows]
    if encoding.kind == "numbers":
        return [" ".join("?" if value < 0 else str(value) for value in row) for row in rows.tolist()]
    letters = np.array([*encoding.alphabet, GAP] if encoding.kind == "text" else [*BASES, "N"])
    length = encoding.shape[0]
    labels = ["" if not encoding.label else f" {'?' if row[-1] < 0 else row[-1]}" for row in rows]
    return ["".join(letters[row[:length]]) + label for row, label in zip(rows, labels, strict=True)]


def _tokens(row: list[int], tokenizer: Tokenizer) -> str:
    """Tokens that follow each other are decoded together; each missing one is a gap."""
    written, known = "", list[int]()
    for token in row:
        if token >= 0:
            known.append(token)
            continue
        written += (tokenizer.decode(known) if known else "") + GAP
        known = []
    return written + (tokenizer.decode(known) if known else "")
