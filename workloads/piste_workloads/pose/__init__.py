"""Keypoints in pictures by heat maps: frames of a video, a COCO folder or a DeepLabCut project."""

from piste_workloads.pose.config import Config
from piste_workloads.pose.train import predict, prepare_data, train

__all__ = ["Config", "headline", "predict", "prepare_data", "test_settings", "train", "verbs"]

verbs = {"predict": predict}

headline = (
    "test/pck",
    "test/pixel_error",
    "valid/pck",
    "train/loss",
    "cost/gradient_evaluations",
    "time/epoch_cpu_s",
)

# For the contract battery: six steps of a small network, a checkpoint every two; `{poses}` is a tiny .npz.
test_settings = {
    "model.width": 4,
    "model.levels": 2,
    "data.path": "{poses}",
    "augmentation.shift": 2,
    "train.epochs": 3,
    "train.batch": 8,
    "checkpoints.every": 2,
}
