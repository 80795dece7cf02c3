"""Text from a trained model: the verb `sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from piste.checkpoints import CheckpointError, load, load_model
from piste.errors import BadInput
from piste_workloads.llm.config import Config
from piste_workloads.llm.model import GPT, LanguageModel
from piste_workloads.llm.tokens import Tokenizer


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
    """Generates text.

    Args:
        config: The recipe of the run that made the checkpoint.
        checkpoint: The checkpoint's folder.
        prompt: What the text goes on from; empty: a new line.
        tokens: How many tokens to add.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: How many of the likeliest tokens are drawn from; 0: all.
        seed: Of the random draws.
        count: How many texts.

    Returns:
        One row a text: `prompt` and `text`.

    Raises:
        BadInput: An option outside its range.
        CheckpointError: There is no checkpoint, or of another architecture.
    """
    state = load(checkpoint)
    if "tokenizer" not in state:
        raise CheckpointError(f"checkpoint {checkpoint}: not one of the workload llm")
    tokenizer = Tokenizer(state["tokenizer"])
    model = GPT(config.model, tokenizer.vocab_size)
    load_model(model, state["model"], str(checkpoint))
    return generate_rows(model, tokenizer, count, tokens, seed, prompt, temperature, top_k)


def generate_rows(
    model: LanguageModel,
    tokenizer: Tokenizer,
    count: int,
    tokens: int,
    seed: int,
    prompt: str = "",
    temperature: float = 0.8,
    top_k: int = 40,
) -> list[dict[str, Any]]:
    """As `sample`, from a model in memory and on its device.

    Raises:
        BadInput: An option outside its range.
    """
    for name, value, least in (
        ("tokens", tokens, 1),
        ("count", count, 1),
        ("temperature", temperature, 0),
        ("top_k", top_k, 0),
    ):
        if not value >= least:
            raise BadInput(f"sample: {name} = {value} must be at least {least}")
    device = next(model.parameters()).device
    prompt_t = torch.tensor(tokenizer.encode(prompt or "\n").tolist(), device=device)
    generator = torch.Generator(device).manual_seed(seed)
    generated_bt = model.generate(prompt_t.expand(count, -1), tokens, temperature, top_k, generator)
    return [
        {"prompt": prompt, "text": tokenizer.decode(row)} for row in generated_bt[:, len(prompt_t) :].tolist()
    ]
