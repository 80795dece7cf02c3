"""A language model: a GPT trained from scratch, or fine-tuned, on a text of your choice."""

from piste_workloads.llm.config import Config
from piste_workloads.llm.sample import sample
from piste_workloads.llm.train import prepare_data, train

__all__ = ["Config", "headline", "prepare_data", "sample", "test_settings", "train", "verbs"]

verbs = {"sample": sample}

headline = (
    "valid/loss",
    "valid/bits_per_byte",
    "train/loss",
    "time/tokens_per_s",
    "time/optimizer_ms",
    "optimizer/state_bytes",
)

# For the contract battery: six steps on a small text of plain bytes, a checkpoint every two.
test_settings = {
    "model.layers": 1,
    "model.heads": 2,
    "model.width": 16,
    "model.context": 16,
    "model.dropout": 0.1,
    "data.source": "file",
    "data.path": "{text}",
    "data.vocab_size": 256,
    "train.steps": 6,
    "train.batch": 4,
    "train.warmup_steps": 1,
    "train.validate_every": 3,
    "train.validation_batches": 1,
    "train.samples": 1,
    "train.sample_tokens": 4,
    "checkpoints.every": 2,
}
