"""Quantization-aware training of image classifiers with learned step sizes (LSQ), 2 to 8 bits."""

from piste_workloads.quantization.config import Config
from piste_workloads.quantization.train import prepare_data, train

__all__ = ["Config", "headline", "prepare_data", "test_settings", "train"]

headline = (
    "test/accuracy",
    "valid/accuracy",
    "train/loss",
    "quantization/weight_bytes",
    "cost/gradient_evaluations",
    "time/epoch_cpu_s",
)

# For the contract battery: six steps of a tiny network, a checkpoint every two.
test_settings = {
    "model.name": "conv",
    "model.width": 4,
    "data.name": "digits",
    "data.samples": 64,
    "augmentation.crop": 1,
    "train.epochs": 3,
    "train.batch": 24,
    "checkpoints.every": 2,
}
