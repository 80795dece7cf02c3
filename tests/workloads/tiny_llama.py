"""A Llama with random weights and a tokenizer of its own, saved as the hub's models are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from piste_workloads.llm.tokens import train_tokenizer

VOCABULARY = 300
TEXT = "".join(f"{n} sheep and {n * n} goats crossed the river “Šárka”.\n" for n in range(300))


def save_tiny_llama(folder: Path, **settings: Any) -> Path:
    """Saves a Llama of two layers; `settings` are fields of its configuration.

    Where `transformers` is missing, the test that needs it is skipped: it is an optional extra.
    """
    transformers = pytest.importorskip("transformers", reason="the optional extra `finetune`")
    from tokenizers import Tokenizer

    serialised = str(train_tokenizer(TEXT, VOCABULARY))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(serialised))
    tokenizer.save_pretrained(folder)
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    config = transformers.LlamaConfig(**defaults | settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
