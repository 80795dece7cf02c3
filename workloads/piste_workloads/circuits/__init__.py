"""Probabilistic circuits: exact likelihoods of text, DNA, genotypes and images, learned by EM or Anemone."""

from piste.workload import Curve
from piste_workloads.circuits.config import Config
from piste_workloads.circuits.train import prepare_data, train
from piste_workloads.circuits.verbs import impute, sample, save, score

__all__ = [
    "Config",
    "curve",
    "headline",
    "impute",
    "prepare_data",
    "sample",
    "save",
    "score",
    "test_settings",
    "train",
    "verbs",
]

verbs = {"score": score, "sample": sample, "impute": impute, "save": save}

headline = (
    "valid/log_likelihood",
    "test/bits_per_dimension",
    "test/accuracy",
    "best/epoch",
    "time/epoch_cpu_s",
)
curve = Curve(
    "valid/log_likelihood", "validation log-likelihood (nats a row)", "epochs", "time/train_s", "max"
)

# For the contract battery: six epochs of a small hidden Markov model on a small text, a checkpoint every two.
test_settings = {
    "data.kind": "text",
    "data.source": "file",
    "data.path": "{text}",
    "data.length": 8,
    "model.name": "hmm",
    "model.latents": 4,
    "rule.name": "anemone",
    "rule.momentum": 0.5,
    "train.epochs": 6,
    "train.batch": 32,
    "train.samples": 2,
    "checkpoints.every": 2,
}
