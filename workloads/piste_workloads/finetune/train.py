"""Fine-tuning: the loop of the workload `llm` on a pre-trained model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from piste.checkpoints import CheckpointError, load, load_model
from piste.workload import Run
from piste_workloads.finetune.config import Config
from piste_workloads.finetune.pretrained import fingerprint, load_pretrained, load_tokenizer
from piste_workloads.llm.sample import generate_rows
from piste_workloads.llm.tokens import Corpus, Tokenizer, open_corpus
from piste_workloads.llm.train import fit


def prepare_data(config: Config) -> str:
    """Makes the tokens of the text, once and before any worker.

    Returns:
        The hash of everything that the run starts from: the text, the tokenizer and the model's weights.

    Raises:
        BadInput: The text or the model cannot be had.
    """
    return hashlib.sha256(f"{_corpus(config).sha256}{fingerprint(config.model)}".encode()).hexdigest()


def _corpus(config: Config) -> Corpus:
    return open_corpus(config, str(load_tokenizer(config.model)))


def train(config: Config, run: Run) -> None:
    """Fine-tunes a model; leaves behind what `piste_workloads.llm.train.fit` does.

    Raises:
        BadInput: As `prepare_data`.
        PisteError: As `fit`.
    """
    corpus = _corpus(config)
    model = load_pretrained(config.model)
    fit(config, run, model, corpus)


def sample(
    config: Config,
    checkpoint: Path,
    prompt: str = "",
    tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    count: int = 1,
) -> list[dict[str, Any]]:
    """Generates text, as `piste_workloads.llm.sample.sample` does.

    Raises:
        BadInput: An option outside its range; the model cannot be had.
        CheckpointError: There is no checkpoint, or of another architecture.
    """
    state = load(checkpoint)
    if "tokenizer" not in state:
        raise CheckpointError(f"checkpoint {checkpoint}: not one of the workload finetune")
    model = load_pretrained(config.model)
    load_model(model, state["model"], str(checkpoint))
    return generate_rows(
        model, Tokenizer(state["tokenizer"]), count, tokens, seed, prompt, temperature, top_k
    )
