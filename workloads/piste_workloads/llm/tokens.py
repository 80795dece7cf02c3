"""The tokens: a byte-level BPE trained on the text, and the two token files, cached by content.

Every token stands for a fixed string of bytes, so that the bytes of any window of tokens are known and
`bits per byte = loss / ln 2 * tokens / bytes` is exact on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from piste.errors import BadInput
from piste_workloads.llm.config import Data, TextRecipe
from piste_workloads.llm.text import cache, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BytePairEncoding

BYTES = "bytes"  # stands for the tokenizer that needs no file: a token a byte
PIECE = 2**20  # characters that are encoded as one
PIECES_AT_ONCE = 16  # in parallel; the tokenizer needs about 100 bytes a token meanwhile
FORMAT = 1  # raised when the same text and settings would give other files


class Tokenizer:
    """Text to token numbers and back, without special tokens.

    Args:
        serialised: What `str()` of a tokenizer gives: a BPE's JSON, or `"bytes"`.
    """

    def __init__(self, serialised: str) -> None:
        self._serialised = serialised
        self._bpe: BytePairEncoding | None = None
        lengths = [1] * 256
        if serialised != BYTES:
            from tokenizers import Tokenizer as BytePairEncoding

            self._bpe = BytePairEncoding.from_str(serialised)
            lengths = _byte_lengths(self._bpe)
        self.bytes_of = np.array(lengths, dtype=np.int64)

    def __str__(self) -> str:
        return self._serialised

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(self.bytes_of)

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        """The token numbers of a text, in the smallest of uint16 and uint32 that holds the vocabulary."""
        dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        if self._bpe is None:
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(dtype)
        parts = [np.empty(0, dtype=dtype)]
        pieces = _pieces(text)
        while some := list(islice(pieces, PIECES_AT_ONCE)):
            parts += [
                np.array(piece.ids, dtype=dtype)
                for piece in self._bpe.encode_batch_fast(some, add_special_tokens=False)
            ]
        return np.concatenate(parts)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token numbers; bytes that are no UTF-8 become the replacement character."""
        if self._bpe is None:
            return bytes(tokens).decode("utf-8", errors="replace")
        return str(self._bpe.decode(list(tokens)))


def _byte_lengths(bpe: BytePairEncoding) -> list[int]:
    """How many bytes of text each token stands for, by its number; 0 where there is no such token."""
    vocabulary = bpe.get_vocab()
    byte_level = "ByteLevel" in str(bpe.decoder)
    lengths = [0] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        if byte_level:  # one character a byte
            lengths[number] = len(token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):  # a byte that no other token has
            lengths[number] = 1
        else:  # SentencePiece writes a space as U+2581
            lengths[number] = len(token.replace("\u2581", " ").encode("utf-8"))
    return lengths


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE, the same one whenever text and size are the same; 256 is plain bytes.

    Raises:
        BadInput: The text has too few repeated byte pairs for such a vocabulary.
    """
    if vocab_size == 256:
        return Tokenizer(BYTES)
    from tokenizers import Tokenizer as BytePairEncoding
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = BytePairEncoding(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_pieces(text), trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise BadInput(
            f"data.vocab_size = {vocab_size}: the text supports {bpe.get_vocab_size()} tokens: "
            "lower it or use more text"
        )
    return Tokenizer(bpe.to_str())


@dataclass(frozen=True)
class Corpus:
    """A text as tokens.

    Attributes:
        tokenizer: Made them.
        train: Token numbers, memory-mapped.
        validation: Token numbers of the held-out end of the text, memory-mapped.
        sha256: The hash of the text and the tokenizer's settings.
    """

    tokenizer: Tokenizer
    train: NDArray[np.unsignedinteger]
    validation: NDArray[np.unsignedinteger]
    sha256: str


def open_corpus(config: TextRecipe, tokenizer: str | None = None) -> Corpus:
    """The tokens of a recipe's text: made once, then found in the cache; safe in many processes at once.

    Args:
        config: The recipe.
        tokenizer: A pre-trained model's tokenizer (fine-tuning); None: one is trained on the training part.

    Raises:
        BadInput: The text cannot be read, is too short, or supports no such vocabulary.
    """
    text = read_text(config.data)
    vocab_size = config.data.vocab_size if isinstance(config.data, Data) else None
    settings = {
        "format": FORMAT,
        "text": hashlib.sha256(text.encode("utf-8")).hexdigest(),
        "vocab_size": vocab_size,
        "validation_fraction": config.data.validation_fraction,
        "tokenizer": tokenizer,
    }
    sha256 = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    folder = cache() / "tokens" / sha256[:32]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _make(folder, text, config, tokenizer)
    train, validation = (np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("train", "validation"))
    _check_length("training", train, config)
    _check_length("validation", validation, config)
    return Corpus(Tokenizer((folder / "tokenizer.json").read_text("utf-8")), train, validation, sha256)


def _make(folder: Path, text: str, config: TextRecipe, serialised: str | None) -> None:
    """Writes a corpus beside its place and renames it into it."""
    train, validation = split_text(text, config.data.validation_fraction)
    if serialised is None:
        assert isinstance(config.data, Data)
        tokenizer = train_tokenizer(train, config.data.vocab_size)
    else:
        tokenizer = Tokenizer(serialised)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (temporary / "tokenizer.json").write_text(str(tokenizer), "utf-8")
        np.save(temporary / "train.npy", tokenizer.encode(train))
        np.save(temporary / "validation.npy", tokenizer.encode(validation))
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def split_text(text: str, validation_fraction: float) -> tuple[str, str]:
    """The training part and the held-out end of a text, cut behind a line where one ends nearby.

    "Nearby" is within a tenth of the held-out part, so that a text without lines is cut all the same.
    """
    cut = round(len(text) * (1.0 - validation_fraction))
    line_end = text.find("\n", cut, cut + (len(text) - cut) // 10)
    cut = cut if line_end < 0 else line_end + 1
    return text[:cut], text[cut:]


def _check_length(part: str, tokens: NDArray[np.unsignedinteger], config: TextRecipe) -> None:
    needed = config.context + 1
    if len(tokens) < needed:
        raise BadInput(
            f"data: the {part} part has {len(tokens)} tokens, and model.context = {config.context} "
            f"needs {needed}: use more text or a shorter context"
        )


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of about `PIECE` characters that end with a line where there are lines."""
    start = 0
    while start < len(text):
        line_end = text.find("\n", start + PIECE, start + 2 * PIECE)
        end = start + PIECE if line_end < 0 else line_end + 1
        yield text[start:end]
        start = end
