"""Probabilistic circuits: structures, exact inference and learning rules."""

from piste_algorithms.circuits.adam import AdamCircuit
from piste_algorithms.circuits.anemone import Anemone
from piste_algorithms.circuits.circuit import Circuit
from piste_algorithms.circuits.expectation_maximization import FullBatchEM, MiniBatchEM, OnlineEM
from piste_algorithms.circuits.hmm import hmm
from piste_algorithms.circuits.rules import LearningRule, StepInfo
from piste_algorithms.circuits.schedules import cosine_decay, power_decay
from piste_algorithms.circuits.structure import Leaf, Product, Structure, Sum, Table

__all__ = [
    "AdamCircuit",
    "Anemone",
    "Circuit",
    "FullBatchEM",
    "Leaf",
    "LearningRule",
    "MiniBatchEM",
    "OnlineEM",
    "Product",
    "StepInfo",
    "Structure",
    "Sum",
    "Table",
    "cosine_decay",
    "hmm",
    "power_decay",
]
