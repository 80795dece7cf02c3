"""Fine-tuning of a pre-trained causal language model of Hugging Face, by folder, GGUF file or hub id."""

from piste_workloads.finetune.config import Config
from piste_workloads.finetune.train import prepare_data, sample, train
from piste_workloads.llm import headline

__all__ = ["Config", "headline", "prepare_data", "sample", "test_settings", "train", "verbs"]

verbs = {"sample": sample}

# For the contract battery: six steps of a tiny model, a checkpoint every two; `{model}` is its folder.
test_settings = {
    "model.name": "{model}",
    "model.context": 16,
    "data.source": "file",
    "data.path": "{text}",
    "train.steps": 6,
    "train.batch": 4,
    "train.warmup_steps": 1,
    "train.validate_every": 3,
    "train.validation_batches": 1,
    "train.samples": 1,
    "train.sample_tokens": 4,
    "checkpoints.every": 2,
}
