"""Rows in writing: text, bases, or numbers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from piste_workloads.circuits.fasta import BASES
from piste_workloads.circuits.rows import Encoding
from piste_workloads.llm.tokens import Tokenizer

GAP = "\N{LOW LINE}"  # a missing character of a text


def spell(x: Tensor, encoding: Encoding) -> list[str]:
    """Each row in writing, a label behind it.

    Args:
        x: `(rows, variables)`, -1 where missing.
        encoding: What the categories mean.
    """
    rows = x.cpu().numpy()
    if not encoding.label:
        return [spell_sequence(row, encoding) for row in rows]
    return [f"{spell_sequence(row[:-1], encoding)} {'?' if row[-1] < 0 else row[-1]}" for row in rows]


def spell_sequence(values: NDArray[np.int64], encoding: Encoding) -> str:
    """Values of any number in writing; a missing character is `_`, a missing base N, a missing number `?`."""
    if encoding.kind == "tokens":
        return _tokens(values.tolist(), _tokenizer(encoding.tokenizer))
    if encoding.kind == "numbers":
        return " ".join("?" if value < 0 else str(value) for value in values.tolist())
    letters = [*encoding.alphabet, GAP] if encoding.kind == "text" else [*BASES, "N"]
    return "".join(np.array(letters)[values])


@lru_cache(maxsize=1)
def _tokenizer(serialised: str) -> Tokenizer:
    return Tokenizer(serialised)


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
