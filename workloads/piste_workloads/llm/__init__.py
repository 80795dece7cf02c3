"""A language model: a GPT trained from scratch, or fine-tuned, on a text of your choice."""

from piste_workloads.llm.config import Config
from piste_workloads.llm.sample import sample
from piste_workloads.llm.train import prepare_data, train

__all__ = ["Config", "prepare_data", "sample", "train", "verbs"]

verbs = {"sample": sample}
