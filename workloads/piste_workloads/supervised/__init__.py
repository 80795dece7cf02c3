"""Training of a network on labelled examples: the loop that the workloads on images share."""

from piste_workloads.supervised.config import SupervisedRecipe, Training
from piste_workloads.supervised.loop import fit
from piste_workloads.supervised.task import Task

__all__ = ["SupervisedRecipe", "Task", "Training", "fit"]
