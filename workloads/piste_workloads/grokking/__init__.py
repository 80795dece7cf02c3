"""Grokking: a network memorises a small task at once and generalises late, or, well optimized, soon."""

from piste_workloads.grokking.config import Config
from piste_workloads.grokking.train import pack_key, prepare_data, train, train_many

__all__ = ["Config", "headline", "pack_key", "prepare_data", "test_settings", "train", "train_many"]

headline = (
    "grok/epochs_to_95",
    "grok/plateau_epochs",
    "time/seconds_to_95",
    "valid/accuracy",
    "test/accuracy",
    "train/loss",
)

# For the contract battery: six epochs of a small sum, a checkpoint every two.
test_settings = {
    "task.modulus": 11,
    "model.width": 16,
    "train.batch": 20,
    "train.epochs": 6,
    "checkpoints.every": 2,
}
