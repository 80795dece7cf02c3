"""Image classification: ResNets, wide ResNets, small networks; label noise, augmentation, sharpness."""

from piste_workloads.images.config import Config
from piste_workloads.images.packed import pack_key, train_many
from piste_workloads.images.predict import predict
from piste_workloads.images.train import prepare_data, train

__all__ = [
    "Config",
    "headline",
    "pack_key",
    "predict",
    "prepare_data",
    "test_settings",
    "train",
    "train_many",
    "verbs",
]

verbs = {"predict": predict}

headline = (
    "test/accuracy",
    "valid/accuracy",
    "train/loss",
    "cost/gradient_evaluations",
    "time/epoch_cpu_s",
)

# For the contract battery: six steps of a tiny MLP, a checkpoint every two.
test_settings = {
    "model.name": "mlp",
    "model.hidden": [16],
    "data.name": "digits",
    "data.samples": 64,
    "augmentation.crop": 1,
    "augmentation.cutout": 2,
    "train.epochs": 3,
    "train.batch": 24,
    "train.sharpness_examples": 16,
    "train.warmup_steps": 1,
    "checkpoints.every": 2,
}
