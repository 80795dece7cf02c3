"""Training of a network on labelled examples: the loop that the workloads on images share."""

from piste_workloads.supervised.config import SupervisedRecipe, Training
from piste_workloads.supervised.loop import check, fit
from piste_workloads.supervised.task import Task

__all__ = ["SupervisedRecipe", "Task", "Training", "check", "fit"]
